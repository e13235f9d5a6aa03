r"""data/text/converters.py: records in the formats of other tools -> canonical rows, strictly checked.

    row type   canonical row
    text       {"text": str}
    label      {"text": str, "label": str}
    tags       {"tokens": [str], "tags": [str]}                       BIO tags, one per token
    chat       {"messages": [message], "references"?: [str]}          ends with an assistant message
    pairs      {"prompt": [message], "chosen": str, "rejected": str, "votes_for"?, "votes_against"?: number}
    ranked     {"prompt": [message], "responses": [str], "rank": [number]}       the smallest rank is best
    prompt     {"prompt": [message]}                                  does not end with an assistant message
    message    {"role", "content", "weight"?}: see messages.py

Two kinds of bad record. A record that cannot be interpreted (a number for a string, an unknown role, a tool
call) raises DataError with its location. A record that can be interpreted but trains nothing (an empty or
missing last answer, all weights 0, chosen equal to rejected) raises SkipRow with the reason; the caller
counts these.

An empty prompt is accepted before an answer. Two assistant messages in a row stay two answers.

Public: SkipRow, and one function (record, location) -> row per format: text, label, tags, completion,
conversation, alpaca, pair, whole_pair, openai_pair, ranking, prompt
"""
import json
import os

from data.runtime.files import DataError
from data.text import messages as read
from data.text.readers import describe_type

HH_ANSWER = "\n\nAssistant:"


class SkipRow(Exception):
    """A record that can be interpreted but trains nothing; the message is the reason it is counted under."""


# ---- text, labels, tags ------------------------------------------------------------------------------------
def text(record, location):
    if read.is_blank(read.string(record["text"], "text", location)):
        raise SkipRow("with an empty text")
    return {"text": record["text"]}


def label(record, location):
    """Labels are names: the number 1 (JSON) and the string "1" (CSV) are the same label."""
    value = record["label"]
    name = value if isinstance(value, str) else json.dumps(value)
    if read.is_blank(name) or type(value) not in (str, int, bool):
        raise DataError(f'{location}: "label" is {json.dumps(value)[:60]}; '
                        "it must be a name, or a whole number")
    return {**text(record, location), "label": name}


def tags(record, location):
    tokens = read.strings(record["tokens"], "tokens", location)
    names = read.strings(record["tags"], "tags", location)
    if len(tokens) != len(names):
        raise DataError(f"{location}: {len(tokens)} tokens and {len(names)} tags; every token needs one tag")
    for name in names:
        if "-" in name and name[:2] not in ("B-", "I-"):            # other schemes, such as BIOES
            raise DataError(f"{location}: the tag {name} is not BIO; the first word of an entity is B-TYPE, "
                            "the others are I-TYPE, and words outside entities are O")
    if not tokens:
        raise SkipRow("without tokens")
    return {"tokens": tokens, "tags": names}


# ---- conversations -----------------------------------------------------------------------------------------
def _chat(record, messages, location):
    """The checks that all conversations share. "references" or "outputs" may replace the last answer."""
    row = {"messages": messages}
    key = "references" if "references" in record else "outputs"
    if record.get(key) is not None:
        answers = read.strings(record[key], key, location)
        row["references"] = [answer for answer in answers if not read.is_blank(answer)]
        if row["references"] and messages[-1]["role"] != "assistant":
            messages.append(read.assistant(row["references"][0]))
    if messages[-1]["role"] != "assistant":
        raise SkipRow("without a last answer")
    trained = [m["content"] for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
    if not trained:
        raise SkipRow("with all weights 0")
    if any(read.is_blank(content) for content in trained):
        raise SkipRow("with an empty answer")
    return row


def completion(record, location):
    """{"prompt", "completion"}, or {"prompt", "references"}."""
    answers = []
    if "completion" in record:
        answers = [read.assistant(read.answer(record, "completion", location))]
    return _chat(record, read.prompt(record, "prompt", location) + answers, location)


def conversation(record, location):
    """{"messages"} (OpenAI) or {"conversations"} (ShareGPT)."""
    key = "messages" if "messages" in record else "conversations"
    return _chat(record, read.messages(record, key, location), location)


def _alpaca_turns(record, location):
    """system, history (pairs of question and answer), then instruction and input as one user message."""
    turns = read.system(record, location)
    history = record.get("history") or []
    if not isinstance(history, list):
        history = [history]
    for exchange in history:
        texts = read.strings(exchange, "history", location)
        if len(texts) != 2:
            raise DataError(f'{location}: "history" holds a list of {len(texts)}; '
                            "it holds [question, answer] pairs")
        turns += [read.user(texts[0]), read.assistant(texts[1])]
    instruction = read.optional_string(record, "instruction", location)
    input_text = read.optional_string(record, "input", location)
    return turns + [read.user("\n".join(part for part in (instruction, input_text) if part))]


def alpaca(record, location):
    """{"instruction"?, "input"?, "output", "system"?, "history"?}."""
    answers = []
    if "output" in record:
        answers = [read.assistant(read.string(record["output"], "output", location))]
    return _chat(record, _alpaca_turns(record, location) + answers, location)


def prompt(record, location):
    messages = read.prompt(record, "prompt", location)
    if all(read.is_blank(message["content"]) for message in messages):
        raise SkipRow("with an empty prompt")
    return {"prompt": messages}


# ---- preferences -------------------------------------------------------------------------------------------
def _pair(record, messages, chosen, rejected, location):
    """The checks that all preferences share."""
    if read.is_blank(chosen) or read.is_blank(rejected):
        raise SkipRow("with an empty answer")
    if chosen == rejected:
        raise SkipRow("with chosen equal to rejected")
    row = {"prompt": messages, "chosen": chosen, "rejected": rejected}
    for key in ("votes_for", "votes_against"):
        if key in record:
            row[key] = read.number(record[key], key, location)
    return row


def pair(record, location):
    """{"prompt" or "instruction" or "conversations", "chosen", "rejected"}."""
    if "instruction" in record:
        messages = _alpaca_turns(record, location)
    elif "prompt" in record:
        messages = read.prompt(record, "prompt", location)
    else:
        messages = read.prompt(record, "conversations", location)
    chosen = read.answer(record, "chosen", location)
    rejected = read.answer(record, "rejected", location)
    return _pair(record, messages, chosen, rejected, location)


def openai_pair(record, location):
    """{"input": {"messages"}, "preferred_output", "non_preferred_output"}."""
    inner = record["input"]
    if not isinstance(inner, dict) or "messages" not in inner:
        raise DataError(f'{location}: "input" is {describe_type(inner)} without "messages"; '
                        'it must be {"messages": [...]}')
    chosen = read.answer(record, "preferred_output", location)
    rejected = read.answer(record, "non_preferred_output", location)
    return _pair(record, read.prompt(inner, "messages", location), chosen, rejected, location)


def whole_pair(record, location):
    """Two conversations (HH transcripts, or lists of messages) that differ in their last answer only."""
    if isinstance(record["chosen"], str):
        return _hh_pair(record, location)
    chosen = read.messages(record, "chosen", location)
    rejected = read.messages(record, "rejected", location)
    for turns in (chosen, rejected):
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise DataError(f'{location}: no "prompt", so "chosen" and "rejected" must each be a '
                            "conversation that ends with an answer")
    if chosen[:-1] != rejected[:-1]:
        raise SkipRow("with conversations that differ before the last answer")
    return _pair(record, chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], location)


def _hh_pair(record, location):
    """Two HH transcripts: the prompt is what both have in common, up to the last "Assistant:" in it."""
    chosen = read.string(record["chosen"], "chosen", location)
    rejected = read.string(record["rejected"], "rejected", location)
    shared = os.path.commonprefix([chosen, rejected])
    if HH_ANSWER not in shared:
        raise DataError(f'{location}: no "prompt", and "chosen" and "rejected" do not begin with the same '
                        "transcript (\\n\\nHuman: ... \\n\\nAssistant: ...); give the prompt its own key")
    end = shared.rindex(HH_ANSWER) + len(HH_ANSWER)
    messages = read.prompt({"chosen": shared[:end]}, "chosen", location)
    chosen = chosen[end:].strip()
    rejected = rejected[end:].strip()
    if "\n\nHuman:" in chosen or "\n\nHuman:" in rejected:
        raise SkipRow("with conversations that differ before the last answer")
    return _pair(record, messages, chosen, rejected, location)


def ranking(record, location):
    """{"prompt", "responses", "rank"}: K answers and their ranks; tied answers give no comparison."""
    responses = read.strings(record["responses"], "responses", location)
    rank = []
    if isinstance(record["rank"], list):
        rank = [read.number(item, "rank", location) for item in record["rank"]]
    if len(responses) != len(rank) or len(rank) < 2:
        raise DataError(f'{location}: "rank" must be a list with a number for each of "responses", '
                        "at least two")
    if any(read.is_blank(response) for response in responses):
        raise SkipRow("with an empty answer")
    if len(set(rank)) == 1:
        raise SkipRow("with equal ranks for all answers")
    return {"prompt": read.prompt(record, "prompt", location), "responses": responses, "rank": rank}
