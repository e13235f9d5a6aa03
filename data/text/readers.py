r"""data/text/readers.py: data files -> records, strictly read -> canonical rows.

    .jsonl .json    one object per line, or one array of objects (seen by its first character)
    .csv .tsv       a header names the keys; in a .tsv a quote is only a quote
    .txt            one record {"text": the whole file}

UTF-8 only, with or without a byte order mark, any line ends. JSON is read more strictly than by Python: a key
twice in one object, NaN, Infinity and half a surrogate pair are errors: they would change data in silence.
A place is "file:17" (or "file:item 17" in an array) and starts every error sentence.

Two sorts of bad record. What cannot be *understood* (a number for a string, an unknown role, a tool call)
raises DataError with its place. What can be understood but *teaches nothing* (an empty or no last answer, all
weights 0, chosen equal to rejected) raises Useless with the reason, under which the row is counted.

An empty prompt is fine: the model speaks first. Two answers in a row are two answers. Messages keep a role
(system, user, assistant), content, and an assistant's weight (1: learnt, 0: context). OpenAI's developer is
system; a name is not rendered. Strings are kept as they are; only the turns of an HH transcript ("\n\nHuman:
...\n\nAssistant: ...") lose the white space around them.

Public: records, what, Useless, and for each format that data/text/formats.py lists a function
(record, place) -> row
"""
import collections
import csv
import io
import json
import math
import os
import re

from data.runtime.files import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
MAX_LINE = 32 << 20                                     # bytes; a longer "line" is a file without line ends
EXAMPLE = '{"prompt": "...", "completion": "..."}'


def what(value):
    """What was found, for error sentences."""
    return {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list",
            dict: "an object"}.get(type(value), "null")


def records(path):
    """(place, dict) for every record of a file."""
    suffix = path.suffix.lower()
    read = {".txt": _text, ".csv": _table, ".tsv": _table}.get(suffix, _json)
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: a data file ends in {' '.join(SUFFIXES)}; save it as one of these")
    for at, row in read(path):
        if not isinstance(row, dict):
            raise DataError(f"{at}: {what(row)}; a row is an object such as {EXAMPLE}")
        yield at, row


def _utf8(raw, path, line=1):
    try:
        return raw.decode("utf-8-sig")                  # -sig: a byte order mark is no part of the text
    except UnicodeDecodeError as e:
        line, byte = line + e.object.count(b"\n", 0, e.start), e.object[e.start]
        raise DataError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from e


def _text(path):
    yield f"{path}:1", {"text": _utf8(path.read_bytes(), path)}


def _json(path):
    with open(path, "rb") as f:
        array = f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        f.seek(0)
        if array:
            rows = _parse(_utf8(f.read(), path), path, 1, "a file that starts with [ is one array of rows")
            yield from ((f"{path}:item {n}", row) for n, row in enumerate(rows, 1))
            return
        for n, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise DataError(f"{path}:{n}: a line of over {MAX_LINE >> 20} MiB; cut it into several rows")
            if text := _utf8(line, path, n).strip():
                yield f"{path}:{n}", _parse(text, path, n, "each line is one whole object")


def _parse(text, path, line, rule):
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):       # only an escape can smuggle in half a pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as e:
        raise DataError(f"{path}:{line + e.lineno - 1}: not JSON ({e.msg}, column {e.colno}); {rule}") from e
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}"
        raise DataError(f"{path}:{line}: {half} is half of a surrogate pair, not a character") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}:{line}: not JSON ({e})") from e


def _unique(pairs):
    row = dict(pairs)                                   # of two, json itself keeps the last
    if len(row) < len(pairs):
        key = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the key "{key}" appears twice')
    return row


def _constant(name):
    raise ValueError(f"{name} is no JSON number")


def _table(path):
    csv.field_size_limit(MAX_LINE)
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
    reader = csv.reader(io.StringIO(_utf8(path.read_bytes(), path), newline=""), strict=True, **style)
    try:
        header = next(reader, [])
        _unique([(key, None) for key in header])
        for cells in filter(None, reader):              # [] is a blank line
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells under a header of {len(header)}: {', '.join(header)}")
            yield f"{path}:{reader.line_num}", dict(zip(header, cells))
    except (csv.Error, ValueError) as e:
        raise DataError(f"{path}:{reader.line_num}: not a table ({e})") from e


# ---- records -> rows ---------------------------------------------------------------------------------------
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant"}
TOOLS = ("tool", "function", "function_call", "observation")


class Useless(Exception):
    """A row that can be understood and teaches nothing; its text is the reason it is counted under."""


# ---- values ------------------------------------------------------------------------------------------------
def _string(value, key, at):
    if not isinstance(value, str):
        raise DataError(f'{at}: "{key}" is {what(value)}; it must be a string')
    return value


def _optional(row, key, at):
    return "" if row.get(key) is None else _string(row[key], key, at)


def _strings(value, key, at):
    if not isinstance(value, list):
        raise DataError(f'{at}: "{key}" is {what(value)}; it must be a list of strings')
    return [_string(x, f"{key}[{n}]", at) for n, x in enumerate(value)]


def _number(value, key, at):
    if type(value) not in (int, float) or not math.isfinite(value):
        raise DataError(f'{at}: "{key}" is {what(value)}; it must be a finite number')
    return value


def _message(m, key, at):
    """One turn, in OpenAI's words (role, content) or ShareGPT's (from, value)."""
    if not isinstance(m, dict):
        raise DataError(f'{at}: "{key}" holds {what(m)}; a message is {{"role": "user", "content": "..."}}')
    role, content = m.get("role", m.get("from")), m.get("content", m.get("value"))
    if role in TOOLS or m.get("tool_calls") or m.get("function_call"):
        raise DataError(f'{at}: "{key}" holds a tool call, which no template here renders; remove such rows')
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f'{at}: "{key}" has the role {json.dumps(role)[:60]}; roles are {", ".join(ROLES)}')
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(_string(part["text"], "text", at) for part in content)     # OpenAI's content parts
    out = {"role": ROLES[role], "content": _string(content, "value" if "from" in m else "content", at)}
    if (weight := m.get("weight")) is not None:
        if weight not in (0, 1) or out["role"] != "assistant":
            raise DataError(f'{at}: "weight" is {json.dumps(weight)} on a {role} turn; assistants: 0 or 1')
        out["weight"] = int(weight)
    return out


def _messages(row, key, at):
    """A string is one user turn, or an HH transcript up to the answer; a list is a conversation."""
    value = row[key]
    if isinstance(value, str):
        turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + value.strip())
        out = [{"role": "user", "content": value}]
        if not turns[0] and turns[-2:] == ["Assistant", ""]:
            out = [{"role": "user" if who == "Human" else "assistant", "content": said.strip()}
                   for who, said in zip(turns[1:-2:2], turns[2:-2:2])]
    elif isinstance(value, list) and value:
        out = [_message(m, key, at) for m in value]
    else:
        found = "an empty list" if value == [] else what(value)
        raise DataError(f'{at}: "{key}" is {found}; it must be a string or a list of messages')
    if row.get("tools") or row.get("functions"):
        raise DataError(f'{at}: "tools" are rendered by no template here; remove them and all calls')
    return _system(row, at) + out


def _system(row, at):
    text = _optional(row, "system", at)
    return [{"role": "system", "content": text}] if text else []


def _prompt(row, key, at):
    messages = _messages(row, key, at)
    if messages[-1]["role"] == "assistant":
        raise DataError(f'{at}: "{key}" ends with an answer; it must end with what is to be answered')
    return messages


def _answer(row, key, at):
    """A string, or the one assistant message that holds it."""
    if isinstance(row[key], str):
        return row[key]
    value = [row[key]] if isinstance(row[key], dict) else row[key]
    turns = _messages({key: value}, key, at)
    if [m["role"] for m in turns] != ["assistant"]:
        raise DataError(f'{at}: "{key}" must be a string, or one assistant message')
    return turns[0]["content"]


# ---- formats -----------------------------------------------------------------------------------------------
def _chat(row, messages, at):
    """The common end of all conversations; `references` or `outputs` may stand in for the last answer."""
    key = "references" if "references" in row else "outputs"
    out = {"messages": messages}
    if row.get(key) is not None:
        out["references"] = [text for text in _strings(row[key], key, at) if text.strip()]
        if out["references"] and messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": out["references"][0]})
    if messages[-1]["role"] != "assistant":
        raise Useless("without a last answer")
    learnt = [m["content"] for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
    if not learnt:
        raise Useless("with all weights 0")
    if not all(text.strip() for text in learnt):
        raise Useless("with an empty answer")
    return out


def completion(row, at):
    last = [{"role": "assistant", "content": _answer(row, "completion", at)}] if "completion" in row else []
    return _chat(row, _prompt(row, "prompt", at) + last, at)


def _alpaca_turns(row, at):
    turns = _system(row, at)
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        said = _strings(pair, "history", at)
        if len(said) != 2:
            raise DataError(f'{at}: "history" holds a list of {len(said)}; it holds [question, answer] pairs')
        turns += [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    asked = [_optional(row, "instruction", at), _optional(row, "input", at)]
    return turns + [{"role": "user", "content": "\n".join(filter(None, asked))}]


def alpaca(row, at):
    last = [{"role": "assistant", "content": _string(row["output"], "output", at)}] if "output" in row else []
    return _chat(row, _alpaca_turns(row, at) + last, at)


def _pair(row, prompt, chosen, rejected, at):
    if not chosen.strip() or not rejected.strip():
        raise Useless("with an empty answer")
    if chosen == rejected:
        raise Useless("with chosen equal to rejected")
    votes = {key: _number(row[key], key, at) for key in ("votes_for", "votes_against") if key in row}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **votes}


def pair(row, at):
    prompt = _alpaca_turns(row, at) if "instruction" in row else \
        _prompt(row, "prompt" if "prompt" in row else "conversations", at)
    return _pair(row, prompt, _answer(row, "chosen", at), _answer(row, "rejected", at), at)


def openai_pair(row, at):
    inner = row["input"] if isinstance(row["input"], dict) else {}
    if "messages" not in inner:
        found = what(row["input"])
        raise DataError(f'{at}: "input" is {found} without "messages"; it must be {{"messages": [...]}}')
    answers = [_answer(row, key, at) for key in ("preferred_output", "non_preferred_output")]
    return _pair(row, _prompt(inner, "messages", at), *answers, at)


def whole_pair(row, at):
    """Two conversations (HH transcripts, or lists of messages) that differ in their last answer only."""
    if isinstance(row["chosen"], str):
        both = [_string(row[key], key, at) for key in ("chosen", "rejected")]
        shared, marker = os.path.commonprefix(both), "\n\nAssistant:"
        if marker not in shared:
            raise DataError(f'{at}: no "prompt", and "chosen" and "rejected" do not begin as one transcript '
                            '(\\n\\nHuman: ... \\n\\nAssistant: ...); give the prompt its own key')
        end = shared.rindex(marker) + len(marker)
        asked = [_prompt({"chosen": shared[:end]}, "chosen", at)]
        answers = [text[end:].strip() for text in both]
        parted = any("\n\nHuman:" in text for text in answers)
    else:
        both = [_messages(row, key, at) for key in ("chosen", "rejected")]
        if any(len(turns) < 2 or turns[-1]["role"] != "assistant" for turns in both):
            raise DataError(f'{at}: no "prompt", so "chosen" and "rejected" must each end a conversation')
        asked = [turns[:-1] for turns in both]
        answers = [turns[-1]["content"] for turns in both]
        parted = asked[0] != asked[1]
    if parted:
        raise Useless("whose conversations part before the last answer")
    return _pair(row, asked[0], *answers, at)


def conversation(row, at):
    return _chat(row, _messages(row, "messages" if "messages" in row else "conversations", at), at)


def ranking(row, at):
    """K answers and their ranks: smaller is better, ties teach nothing about the tied."""
    responses = _strings(row["responses"], "responses", at)
    rank = [_number(x, "rank", at) for x in row["rank"]] if isinstance(row["rank"], list) else []
    if len(responses) != len(rank) or len(rank) < 2:
        raise DataError(f'{at}: "rank" must be a list with a number for each of "responses", at least two')
    if not all(text.strip() for text in responses):
        raise Useless("with an empty answer")
    if len(set(rank)) == 1:
        raise Useless("with all answers ranked alike")
    return {"prompt": _prompt(row, "prompt", at), "responses": responses, "rank": rank}


def prompt(row, at):
    messages = _prompt(row, "prompt", at)
    if not any(m["content"].strip() for m in messages):
        raise Useless("with an empty prompt")
    return {"prompt": messages}


def text(row, at):
    if not _string(row["text"], "text", at).strip():
        raise Useless("with an empty text")
    return {"text": row["text"]}


def label(row, at):
    """Labels are names: 1 in JSON and 1 in CSV are the same label, "1"."""
    value = row["label"] if isinstance(row["label"], str) else json.dumps(row["label"])
    if not value.strip() or type(row["label"]) not in (str, int, bool):
        found = json.dumps(row["label"])[:60]
        raise DataError(f'{at}: "label" is {found}; it must be a name, or a whole number')
    return {**text(row, at), "label": value}


def tags(row, at):
    tokens, tags = _strings(row["tokens"], "tokens", at), _strings(row["tags"], "tags", at)
    if len(tokens) != len(tags):
        raise DataError(f'{at}: {len(tokens)} tokens and {len(tags)} tags; every token needs one tag')
    if odd := [tag for tag in tags if "-" in tag and tag[:2] not in ("B-", "I-")]:      # BIOES counts no name
        raise DataError(f'{at}: the tag {odd[0]} is not BIO; a name is B-KIND, then I-KIND, all else is O')
    if not tokens:
        raise Useless("without tokens")
    return {"tokens": tokens, "tags": tags}
