r"""data/text/converters.py: records in the formats of other tools -> canonical rows, strictly checked.

    row type   canonical row
    text       {"text": str}
    label      {"text": str, "label": str}
    tags       {"tokens": [str], "tags": [str]}                       BIO tags, one per token
    chat       {"messages": [message], "references"?: [str]}          ends with an assistant message
    pairs      {"prompt": [message], "chosen": str, "rejected": str, "votes_for"?, "votes_against"?: number}
    ranked     {"prompt": [message], "responses": [str], "rank": [number]}       the smallest rank is best
    thumbs     {"prompt": [message], "completion": str, "label": bool}           true: good, false: bad
    prompt     {"prompt": [message]}                                  does not end with an assistant message
    message    {"role", "content", "weight"?}: see messages.py

A record comes with the keys of its format only (recognise.py). Blanks around labels and tags are removed.

Two kinds of bad record. A record that cannot be interpreted (a number for a string, an unknown role, a tool
call) raises DataError with its location. A record that can be interpreted but trains nothing (an empty or
missing last answer, all weights 0, chosen equal to rejected) raises SkipRow with the reason; the caller
counts these.

An empty prompt is accepted before an answer. Two assistant messages in a row stay two answers.

Public: SkipRow, and one function (record, location) -> row per format: text, label, tags, completion,
conversation, instruction, pair, whole_pair, openai_pair, ranking, thumbs, prompt
"""
import json
import os
import re

from data.runtime.files import DataError, printable
from data.text import messages as read
from data.text.readers import describe_type, shown

HH_ANSWER = "\n\nAssistant:"
BIO = re.compile(r"O|[BI]-[^\s,:]+")


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
    if type(value) not in (str, int, bool) or isinstance(value, str) and read.is_blank(value):
        raise DataError(f'{location}: "label" is {shown(value)}; it must be a name, or a whole number')
    name = value.strip() if isinstance(value, str) else json.dumps(value)
    return {**text(record, location), "label": name}


def tags(record, location):
    tokens = read.strings(record["tokens"], "tokens", location)
    names = [name.strip() for name in read.strings(record["tags"], "tags", location)]
    if len(tokens) != len(names):
        raise DataError(f"{location}: {len(tokens)} tokens and {len(names)} tags; every token needs one tag")
    for name in names:
        if not BIO.fullmatch(name):                     # other schemes, such as BIOES; parts of speech
            raise DataError(f"{location}: the tag {printable(name)} is not BIO; the first word of an entity "
                            "is B-TYPE, the others are I-TYPE, and words outside entities are O; a TYPE has no blank, "
                            "comma or colon")
    if not tokens:
        raise SkipRow("without tokens")
    return {"tokens": tokens, "tags": names}


# ---- conversations -----------------------------------------------------------------------------------------
def _chat(record, messages, location):
    """The checks that all conversations share. "references" or "outputs" may replace the last answer."""
    row = {"messages": messages}
    key = read.either(record, ("references", "outputs"), location)
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
    """{"prompt", and "completion", "response" or "references"}."""
    key = "completion" if "completion" in record else "response"
    answers = [read.answer(record, key, location)] if key in record else []
    return _chat(record, read.prompt(record, "prompt", location) + answers, location)


def conversation(record, location):
    """{"messages"} (OpenAI) or {"conversations"} (ShareGPT)."""
    key = "messages" if "messages" in record else "conversations"
    return _chat(record, read.messages(record, key, location), location)


def _instruction_turns(record, location):
    """system, history (pairs of question and answer), then what is asked as one user message: the instruction
    or question, and on lines below it the input or context."""
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
    parts = [read.optional_string(record, key, location)
             for key in ("instruction", "question", "query", "input", "context")]
    return turns + [read.user("\n".join(part for part in parts if part))]


def instruction(record, location):
    """{"instruction", "question" or "query", "input"?, "context"?, and "output", "response" or "answer"}."""
    answers = [read.assistant(read.string(record[key], key, location))
               for key in ("output", "response", "answer") if key in record]
    return _chat(record, _instruction_turns(record, location) + answers, location)


def prompt(record, location):
    messages = read.prompt(record, "prompt", location)
    if all(read.is_blank(message["content"]) for message in messages):
        raise SkipRow("with an empty prompt")
    return {"prompt": messages}


# ---- preferences -------------------------------------------------------------------------------------------
def _pair(record, messages, chosen, rejected, location):
    """The checks that all preferences share. chosen, rejected: assistant messages."""
    for key, message in (("chosen", chosen), ("rejected", rejected)):
        if not message.get("weight", 1):
            raise DataError(f'{location}: the "{key}" answer has weight 0, but a preference is about it')
        if read.is_blank(message["content"]):
            raise SkipRow("with an empty answer")
    if chosen["content"] == rejected["content"]:
        raise SkipRow("with chosen equal to rejected")
    row = {"prompt": messages, "chosen": chosen["content"], "rejected": rejected["content"]}
    for key in ("votes_for", "votes_against"):
        if key in record:
            row[key] = read.number(record[key], key, location)
    return row


def pair(record, location):
    """{"prompt", "conversations", or "instruction", "question" and "input", and "chosen", "rejected"}."""
    key = next((key for key in ("prompt", "conversations") if key in record), None)
    messages = read.prompt(record, key, location) if key else _instruction_turns(record, location)
    if all(isinstance(record[key], list) and len(record[key]) > 1 for key in ("chosen", "rejected")):
        return _pair_with_prompt(record, messages, location)
    chosen = read.answer(record, "chosen", location)
    rejected = read.answer(record, "rejected", location)
    return _pair(record, messages, chosen, rejected, location)


def _pair_with_prompt(record, messages, location):
    """Two whole conversations beside their prompt, which must be a part of them (UltraFeedback)."""
    row = whole_pair(record, location)
    shared = [(m["role"], m["content"].strip()) for m in row["prompt"]]
    if any((m["role"], m["content"].strip()) not in shared for m in messages):
        raise SkipRow("with a prompt that is no part of its conversations")
    return row


def openai_pair(record, location):
    """{"input": {"messages"}, "preferred_output", "non_preferred_output"}."""
    inner = record["input"]
    if not isinstance(inner, dict) or "messages" not in inner:
        raise DataError(f'{location}: "input" is {describe_type(inner)} without "messages"; '
                        'it must be {"messages": [...]}')
    read.check_supported(inner, location)
    chosen = read.answer(record, "preferred_output", location)
    rejected = read.answer(record, "non_preferred_output", location)
    return _pair(record, read.prompt({"messages": inner["messages"]}, "messages", location), chosen, rejected,
                 location)


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
    return _pair(record, chosen[:-1], chosen[-1], rejected[-1], location)


def _hh_pair(record, location):
    """Two HH transcripts: the prompt is what both have in common, up to the last "Assistant:" in it."""
    chosen = read.string(record["chosen"], "chosen", location)
    rejected = read.string(record["rejected"], "rejected", location)
    shared = os.path.commonprefix([chosen, rejected])
    if HH_ANSWER not in shared:
        raise DataError(f'{location}: no "prompt", and "chosen" and "rejected" do not begin with the same '
                        "transcript (\\n\\nHuman: ... \\n\\nAssistant: ...); give the prompt its own key")
    end = shared.rindex(HH_ANSWER) + len(HH_ANSWER)
    messages = read.messages({**record, "chosen": shared[:end]}, "chosen", location)
    if messages[-1]["role"] == "assistant":
        raise SkipRow("with two answers in a row")
    chosen = chosen[end:].strip()
    rejected = rejected[end:].strip()
    if "\n\nHuman:" in chosen or "\n\nHuman:" in rejected:
        raise SkipRow("with conversations that differ before the last answer")
    if HH_ANSWER in chosen or HH_ANSWER in rejected:
        raise SkipRow("with two answers in a row")
    return _pair(record, messages, read.assistant(chosen), read.assistant(rejected), location)


TRUTH = {"true": True, "false": False, "1": True, "0": False}       # label of a thumb, as JSON or in a table


def thumbs(record, location):
    """An answer and whether it is good: {"prompt", "completion" or "response", "label"} (TRL's unpaired
    preference), or a conversation or instruction with "kto_tag" (LLaMA-Factory)."""
    key = "kto_tag" if "kto_tag" in record else "label"
    label = TRUTH.get(str(record[key]).strip().lower()) if type(record[key]) in (bool, int, str) else None
    if label is None:
        raise DataError(f'{location}: "{key}" is {shown(record[key])}; beside a prompt and an answer it is true '
                        "(thumbs up) or false (thumbs down); a text to classify has the keys text and label, and "
                        'rows without thumbs have no "label"')
    chat = {name: value for name, value in record.items() if name != key}
    if "messages" in chat or "conversations" in chat:
        row = conversation(chat, location)
    elif "prompt" in chat:
        row = completion(chat, location)
    else:
        row = instruction(chat, location)
    *turns, last = row["messages"]
    return {"prompt": turns, "completion": last["content"], "label": label}


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
