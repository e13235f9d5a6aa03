r"""data/text/messages.py: typed access to a record's values, and conversations of other tools as messages.

    message   {"role": "system" | "user" | "assistant", "content": str, "weight"?: 0 | 1}

`weight` belongs to assistant messages (OpenAI's fine-tuning format): 1 trains on the message, 0 uses it as
context. OpenAI's role "developer" becomes "system"; names are ignored. Strings are kept unchanged, except
that the turns of a transcript of Anthropic's HH ("\n\nHuman: ...\n\nAssistant: ...") are stripped.

Every function takes the record's location ("data.jsonl:17") and raises DataError, with that location, for a
value of the wrong type, an unknown role, or a tool call.

Public: string, optional_string, strings, number, is_blank, user, assistant, messages, system, prompt, answer
"""
import json
import math
import re

from data.runtime.files import DataError
from data.text.readers import describe_type

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant"}
TOOL_ROLES = ("tool", "function", "function_call", "observation")


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
    if type(value) not in (int, float) or not math.isfinite(value):
        raise DataError(f'{location}: "{key}" is {describe_type(value)}; it must be a finite number')
    return value


def is_blank(text):
    return not text.strip()


# ---- messages ----------------------------------------------------------------------------------------------
def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def _message(message, key, location):
    """One message with OpenAI's keys (role, content) or ShareGPT's (from, value), in canonical form."""
    if not isinstance(message, dict):
        raise DataError(f'{location}: "{key}" holds {describe_type(message)}; '
                        'a message is {"role": "user", "content": "..."}')
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise DataError(f'{location}: "{key}" holds a tool call, and no chat template here renders one; '
                        "remove such rows")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f'{location}: "{key}" has the role {json.dumps(role)[:60]}; '
                        f'roles are {", ".join(ROLES)}')
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(string(part["text"], "text", location) for part in content)  # OpenAI content parts
    content_key = "value" if "from" in message else "content"
    result = {"role": ROLES[role], "content": string(content, content_key, location)}
    weight = message.get("weight")
    if weight is not None:
        if weight not in (0, 1) or result["role"] != "assistant":
            raise DataError(f'{location}: "weight" is {json.dumps(weight)} on a message of role {role}; '
                            "only assistant messages have a weight, 0 or 1")
        result["weight"] = int(weight)
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
    if record.get("tools") or record.get("functions"):
        raise DataError(f'{location}: "tools" are not supported, because no chat template here renders them; '
                        "remove them and all tool calls")
    return system(record, location) + turns


def system(record, location):
    content = optional_string(record, "system", location)
    return [{"role": "system", "content": content}] if content else []


def prompt(record, key, location):
    turns = messages(record, key, location)
    if turns[-1]["role"] == "assistant":
        raise DataError(f'{location}: "{key}" ends with an answer; it must end before the answer')
    return turns


def answer(record, key, location):
    """The text under a key: a string, one assistant message, or a list that holds one."""
    value = record[key]
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    turns = messages({key: value}, key, location)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise DataError(f'{location}: "{key}" must be a string, or one assistant message')
    return turns[0]["content"]
