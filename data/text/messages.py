r"""data/text/messages.py: typed access to a record's values, and conversations of other tools as messages.

    message   {"role": "system" | "user" | "assistant", "content": str, "weight"?: 0 | 1}

An assistant message is a target unless it says otherwise under one of TARGET_KEYS, with 0 or false: "weight"
(OpenAI), "train", "training" (Axolotl), "loss" (ms-swift), "trainable", "loss_weight". OpenAI's role
"developer" becomes "system". Strings are kept unchanged, except that the turns of a transcript of Anthropic's
HH ("\n\nHuman: ...\n\nAssistant: ...") are stripped. In a table every value is a string; a list there is
written as JSON (decode_json).

Every function takes the record's location ("data.jsonl:17") and raises DataError, with that location, for a
value of the wrong type, an unknown role, a tool call, an image. Keys of a message that are not read are named
by unread_keys.

Public: string, optional_string, strings, number, is_blank, either, decode_json, user, assistant, messages,
system, prompt, answer, as_text, check_supported, unread_keys
"""
import math
import re

from data.runtime.files import DataError
from data.text.readers import describe_type, parse_json, shown

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant"}
TOOL_ROLES = ("tool", "function", "function_call", "observation")
TARGET_KEYS = ("weight", "loss_weight", "loss", "train", "trainable", "training")
MESSAGE_KEYS = {"role", "from", "content", "value", *TARGET_KEYS}
UNSUPPORTED = {**dict.fromkeys(("tools", "functions"), "no chat template here renders them"),
               **dict.fromkeys(("images", "image", "videos", "audios"), "the models here read text only")}
TEXT_PARTS = (None, "text", "input_text", "output_text")
LISTS = {"messages", "conversations", "tokens", "tags", "responses", "rank", "references", "outputs",
         "history"}
NUMBERS = {"votes_for", "votes_against"}
PREFERENCES = {"chosen", "rejected", "preferred_output", "non_preferred_output"}
MAX_NUMBER = 10 ** 6                                    # ranks and votes: exact in fp32


# ---- values ------------------------------------------------------------------------------------------------
def string(value, key, location):
    if not isinstance(value, str):
        raise DataError(f'{location}: "{key}" is {describe_type(value)}; it must be a string')
    return value


def optional_string(record, key, location):
    """The string under a key; "" when it is missing or null."""
    value = record.get(key)
    return "" if value is None else string(value, key, location)


def strings(value, key, location):
    if not isinstance(value, list):
        raise DataError(f'{location}: "{key}" is {describe_type(value)}; it must be a list of strings')
    return [string(item, f"{key}[{n}]", location) for n, item in enumerate(value)]


def number(value, key, location):
    finite = type(value) is int or type(value) is float and math.isfinite(value)
    if not finite:
        raise DataError(f'{location}: "{key}" is {describe_type(value)}; it must be a finite number')
    if abs(value) > MAX_NUMBER:
        raise DataError(f'{location}: "{key}" is {shown(value)}; a number here is at most {MAX_NUMBER:,}')
    return value


def is_blank(text):
    return not text.strip()


def either(record, keys, location):
    """The one of some keys with the same meaning that holds something; the last if none does.

    Raises DataError if several do.
    """
    given = [key for key in keys if record.get(key) not in (None, "", [])]
    if len(given) > 1:
        raise DataError(f'{location}: "{given[0]}" and "{given[1]}" mean the same; keep one')
    present = [key for key in keys if key in record]
    return (given or present or keys)[-1]


def decode_json(record, location):
    """The record, with lists, messages and votes that are written as a JSON string (a cell of a table) decoded.

    Under a key of LISTS every string that begins like JSON is one; under a key that may also hold text, only
    a list of messages, [{"role": "user", "content": ...}, ...], and of PREFERENCES a single one.
    """
    decoded = {}
    for key, value in record.items():
        if value == "" and key in ("references", "outputs", *NUMBERS):
            decoded[key] = None                         # an empty cell
        elif key in NUMBERS and isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", value):
            decoded[key] = float(value)
        if not isinstance(value, str) or not re.match(r"\s*[\[{]", value):
            continue
        is_list = value.lstrip().startswith("[")
        may_hold_messages = key in PREFERENCES or key in ("prompt", "completion") and is_list
        openai_input = key == "input" and "preferred_output" in record
        if key in LISTS or openai_input or may_hold_messages and _is_messages(value):
            decoded[key] = parse_json(value, lambda _: f'{location}: "{key}" is a string',
                                      "a list or object in a string is written as by json.dumps")
    return {**record, **decoded} if decoded else record


def _is_messages(text):
    """Whether a string looks like a message or a list of them, as JSON or as Python prints it."""
    if not re.fullmatch(r"\s*(\[\s*\{.*\}\s*\]|\{.*\})\s*", text, re.S):
        return False
    roles = "|".join((*ROLES, *TOOL_ROLES))
    has_role = re.search(rf"""["'](role|from)["']\s*:\s*["']({roles})["']""", text)
    return bool(has_role and re.search(r"""["'](content|value)["']\s*:""", text))


# ---- messages ----------------------------------------------------------------------------------------------
def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def _content(message, key, location):
    """The text of a message; OpenAI's content parts are joined."""
    content_key = "value" if "from" in message else "content"
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        for part in content:
            if part.get("type") not in TEXT_PARTS:
                raise DataError(f'{location}: "{key}" holds a part of type {shown(part["type"])}; the models '
                                "here read text only; remove such rows")
        content = "".join(string(part.get("text"), "text", location) for part in content)
    return string(content, content_key, location)


def _is_target(message, role, location):
    """Whether an assistant message is a target: True, False, or None if it does not say so."""
    given = {key: message[key] for key in TARGET_KEYS if message.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1) or value and ROLES[role] != "assistant":
            raise DataError(f'{location}: "{key}" is {shown(value)} on a message of role {role}; only '
                            "assistant messages are targets, with 1 or true, or not, with 0 or false")
    if len(set(map(bool, given.values()))) > 1:
        raise DataError(f"{location}: {' and '.join(given)} of one message contradict each other; keep one")
    return bool(next(iter(given.values()))) if given else None


def _message(message, key, location):
    """One message with OpenAI's keys (role, content) or ShareGPT's (from, value), in canonical form."""
    if not isinstance(message, dict):
        raise DataError(f'{location}: "{key}" holds {describe_type(message)}; '
                        'a message is {"role": "user", "content": "..."}')
    role = message.get("role", message.get("from"))
    if role in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise DataError(f'{location}: "{key}" holds a tool call, and no chat template here renders one; '
                        "remove such rows")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f'{location}: "{key}" has the role {shown(role)}; roles are {", ".join(ROLES)}')
    check_supported(message, f"{location}: \"{key}\"")
    result = {"role": ROLES[role], "content": _content(message, key, location)}
    target = _is_target(message, role, location)
    if target is not None and result["role"] == "assistant":
        result["weight"] = int(target)
    return result


def _hh_turns(text):
    """An HH transcript that ends with "Assistant:" as messages; None for any other text."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())
    if parts[0] or parts[-2:] != ["Assistant", ""]:
        return None
    turns = []
    for speaker, content in zip(parts[1:-2:2], parts[2:-2:2]):
        content = content.strip()
        turns.append(user(content) if speaker == "Human" else assistant(content))
    return turns


def messages(record, key, location):
    """The conversation under a key: a list of messages; or a string, one user message or HH transcript."""
    value = record[key]
    if isinstance(value, str):
        turns = _hh_turns(value)
        if turns is None:
            turns = [user(value)]
    elif isinstance(value, list) and value:
        turns = [_message(message, key, location) for message in value]
    else:
        found = "an empty list" if value == [] else describe_type(value)
        raise DataError(f'{location}: "{key}" is {found}; it must be a string or a list of messages')
    first = system(record, location)
    if first and turns[0]["role"] == "system":
        if turns[0] != first[0]:
            raise DataError(f'{location}: "{key}" begins with a system message, and the row has another one')
        return turns
    return first + turns


def system(record, location):
    """[the system message beside a conversation], or []."""
    key = either(record, ("system", "system_prompt"), location)
    content = optional_string(record, key, location)
    return [{"role": "system", "content": content}] if content else []


def prompt(record, key, location):
    turns = messages(record, key, location)
    if turns[-1]["role"] == "assistant":
        raise DataError(f'{location}: "{key}" ends with an answer; it must end before the answer')
    return turns


def answer(record, key, location):
    """The answer under a key, a string, one assistant message or a list that holds one, as a message."""
    value = record[key]
    if isinstance(value, str):
        return assistant(value)
    if isinstance(value, dict):
        value = [value]
    turns = messages({key: value}, key, location)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise DataError(f'{location}: "{key}" must be a string, or one assistant message')
    return turns[0]


def as_text(turns):
    """Messages as one text: the content of a single message, else "role: content" on a line for each."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


# ---- what is not read --------------------------------------------------------------------------------------
def check_supported(record, location):
    """Raises DataError for a record or message with tools, images or sound, which change what it means."""
    for key, reason in UNSUPPORTED.items():
        if record.get(key):
            raise DataError(f'{location}: "{key}" is not supported, because {reason}; remove such rows, or '
                            "the key where the text does not need it")


def unread_keys(value, path):
    """Names such as "messages[].thinking" of the keys inside messages that hold something and are not read.

    value: what a record holds under the key `path`.
    """
    items, inner = (value, f"{path}[]") if isinstance(value, list) else ([value], path)
    if not items or not isinstance(items[0], dict):
        return set()
    found = set()
    for item in items:
        if not isinstance(item, dict):
            continue
        if "role" in item or "from" in item:
            known = MESSAGE_KEYS
        elif "messages" in item:                        # "input" of OpenAI's preferences
            known = {"messages"}
        else:                                           # a part of a content
            known = {"type", "text"}
        for key, held in item.items():
            if key not in known and held not in (None, "", [], {}):
                found.add(f"{inner}.{key}")
            elif key in ("messages", "content") and isinstance(held, list):
                found |= unread_keys(held, f"{inner}.{key}")
    return found
