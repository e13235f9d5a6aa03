"""data/batches/row_types.py: one record per row type: keys, conversation, references, example.

    row type   conversation (ends with the answer)    references        example
    text       none: raw text                         none              windows of a stream (examples.py)
    label      text + question -> label               the label         answer tokens, or one class number
    tags       text + question -> "PER: Fay, ..."     the same text     answer tokens, or a class per word
    chat       its messages                           its references    answer tokens
    pairs      prompt -> chosen                       chosen            Ranking of two answers
    ranked     prompt -> the best response            the best one      Ranking of K answers
    thumbs     prompt -> its completion               it, "not: ..."    Thumbs of one answer
    prompt     prompt -> ""                           ""                Ranking of two empty answers

Every function takes a Text (examples.py), which knows the tokenizer, the template and the labels, and a row
of data/text/converters.py. With Text.classifier "lm" a label is an answer like any other; with "head" it is
a class number: labels are read at the last token of the prompt, tags at the first token of each word.

Public: RowType, ROW_TYPES, row_type_of, Ranking, Thumbs, as_thumbs, mismatched, distinct
"""
import typing
import unicodedata

from data.batches import objectives
from data.batches.objectives import Example
from data.text import chat, entities
from data.runtime.files import DataError


class Ranking(typing.NamedTuple):
    """A prompt and answers of which some are better than others."""
    prompt: list                    # ids
    answers: list                   # lists of ids, each with its end token, best first
    ranks: list                     # one per answer, smaller is better; of a pair: 0 and the vote margin
    reference: tuple = ()           # log-probabilities of the answers before training


class Thumbs(typing.NamedTuple):
    """A prompt and answers of which each is good or bad, thumbs up or down."""
    prompt: list                    # ids
    answers: list                   # lists of ids, each with its end token
    good: list                      # a bool for each answer
    reference: tuple = ()           # log-probabilities of the answers before training
    mismatched: tuple = ()          # answers to another prompt
    mismatched_reference: tuple = ()        # their log-probabilities behind this prompt before training
    z0: float = 0.0                 # of the step that the example is in: ppo.kto_z0


def as_thumbs(example):
    """The Thumbs of a Ranking: an answer that wins more comparisons than it loses is good, one that loses
    more is bad, any other is left out. A Thumbs stays as it is."""
    if isinstance(example, Thumbs):
        return example
    answers = []
    good = []
    for answer, rank in zip(example.answers, example.ranks):
        won = sum(other > rank for other in example.ranks)
        lost = sum(other < rank for other in example.ranks)
        if won != lost:
            answers.append(answer)
            good.append(won > lost)
    return Thumbs(example.prompt, answers, good)


def mismatched(examples):
    """For each example the answers of the one that stands half the data further on, so that each is used
    once; if that has the same prompt, of the next one that has not. () where all prompts are equal."""
    n = len(examples)
    following = [None] * n                              # the next example with another prompt
    for i in reversed(range(2 * n)):                    # twice around: the first one follows the last
        after = (i + 1) % n
        differs = examples[i % n].prompt != examples[after].prompt
        following[i % n] = after if differs else following[after]
    found = []
    for i, example in enumerate(examples):
        other = (i + n // 2) % n
        if examples[other].prompt == example.prompt:
            other = following[other]
        found.append(() if other is None else tuple(examples[other].answers))
    return found


def _conversation(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _location(row):
    return row.get("line", "a row")


# ---- answers as tokens -------------------------------------------------------------------------------------
def _encode_answer(text, row, max_len, too_long):
    """The conversation with its answers as targets: an (ids, mask) pair, or for a GLM an Example.

    Virtual tokens of a template, and a GLM's mask and start token, stand around the prompt. Where they do, where
    the prompt is read in both directions, and where a chat template shows earlier answers otherwise (qwen3), the
    last answer alone is a target: an earlier one would stand behind other tokens than it is asked with.
    """
    before, after = text.around_prompt
    turns = text.turns(row)
    last_only = after or text.attention != "causal" or chat.asks_otherwise_later(text.template, text.tokenizer)
    if last_only:                                           # answers of weight 0 behind it would move it
        trained = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("weight", 1)]
        turns = turns[:trained[-1] + 1]
    ids, mask = chat.render(turns, text.template, text.tokenizer, text.system)
    if last_only:
        start = start_of_last(mask)
        mask = [False] * start + mask[start:]
    fitted = chat.fit_to_length(ids, mask, max_len - len(before) - len(after), too_long, _location(row),
                                text.start_length)
    if fitted is None:
        return None, False
    truncated = len(fitted[0]) < len(ids)
    ids, mask = fitted
    first_target = mask.index(True)
    ids = before + ids[:first_target] + after + ids[first_target:]
    mask = [False] * len(before) + mask[:first_target] + [False] * len(after) + mask[first_target:]
    if not text.infill_suffix:
        return (ids, mask), truncated
    inputs = ids[:-1]
    y = [token if target else -1 for token, target in zip(ids[1:], mask[1:])]
    start = mask.index(True) - 1                            # the start token of the span that is the answer
    return Example(inputs, y, start, objectives.glm_single_span(len(inputs), start)), truncated


def start_of_last(mask):
    """The index at which the last run of True begins."""
    start = len(mask) - 1 - mask[::-1].index(True)
    while start and mask[start - 1]:
        start -= 1
    return start


# ---- labels ------------------------------------------------------------------------------------------------
def _label_turns(text, row):
    question = text.question
    if question is None:
        question = f"Which label fits this text: {' or '.join(text.labels)}?"
    content = f"{row['text']}\n\n{question}" if question else row["text"]
    return _conversation(content, row["label"])


def _encode_label(text, row, max_len, too_long):
    if text.classifier == "lm":
        return _encode_answer(text, row, max_len, too_long)
    chat.require_room(max_len - sum(map(len, text.around_prompt)))
    ids = text.prompt_ids(row)
    if chat.fit_to_length(ids, [False] * len(ids), max_len, too_long, _location(row)) is None:
        return None, False
    truncated = len(ids) > max_len
    if truncated:
        ids = text.prompt_ids(row, limit=max_len)
    y = [-1] * (len(ids) - 1) + [text.labels.index(row["label"])]
    bidirectional_len, glm_positions = text.attention_args(ids)
    return Example(ids, y, bidirectional_len, glm_positions, head=True), truncated


# ---- tags --------------------------------------------------------------------------------------------------
def _tags_turns(text, row):
    content = f"{' '.join(row['tokens'])}\n\n{entities.question(text.labels)}"
    return _conversation(content, _tags_references(text, row)[0])


def _tags_references(text, row):
    return [entities.format_entities(row["tokens"], row["tags"])]


def _encode_tags(text, row, max_len, too_long):
    """With a head: a class number at the first token of each word; words behind max_len are cut."""
    if text.classifier == "lm":
        return _encode_answer(text, row, max_len, too_long)
    before, after = text.soft_prompt_ids
    start = chat.prompt([], "plain", text.tokenizer, "")[0]
    ids, positions = entities.word_tokens(row["tokens"], text.tokenizer, start)
    room = chat.require_room(max_len - len(before) - len(after))
    kept = ids[:room]
    y = [-1] * len(kept)
    for position, tag in zip(positions, row["tags"]):
        if position < len(kept):
            y[position] = text.labels.index(tag)
    ids = before + kept + after
    y = [-1] * len(before) + y + [-1] * len(after)
    bidirectional_len = 0 if text.attention == "causal" else len(ids)
    tagged = sum(target >= 0 for target in y)
    return Example(ids, y, bidirectional_len, head=True), tagged < len(row["tokens"])


# ---- conversations -----------------------------------------------------------------------------------------
def _chat_turns(text, row):
    return row["messages"]


def _chat_references(text, row):
    return row.get("references") or [row["messages"][-1]["content"]]


# ---- preferences -------------------------------------------------------------------------------------------
def _pair_answers(row):
    return [row["chosen"], row["rejected"]]


def _ranked_answers(row):
    ranked = sorted(zip(row["rank"], row["responses"]), key=lambda pair: pair[0])
    return [response for _, response in ranked]


def _no_answers(row):
    return ["", ""]


def _pair_ranks(row):
    margin = row.get("votes_for", 1) - row.get("votes_against", 0)
    return [0, max(1, margin)]


def _ranked_ranks(row):
    return sorted(row["rank"])


def _select_pair(row, kept):
    return row if len(kept) == 2 else None


def _select_ranked(row, kept):
    ranked = sorted(zip(row["rank"], row["responses"]), key=lambda pair: pair[0])
    rank, responses = zip(*(ranked[i] for i in kept))
    if len(set(rank)) == 1:
        return None
    return {**row, "responses": list(responses), "rank": list(rank)}


def _preference_turns(text, row):
    return [*row["prompt"], {"role": "assistant", "content": _preference_references(text, row)[0]}]


def _preference_references(text, row):
    return row_type_of(row).answers(row)[:1]


def _thumb_answers(row):
    return [row["completion"]]


def _thumb_references(text, row):
    return [row["completion"] if row["label"] else f"not: {row['completion']}"]


def _thumb_turns(text, row):
    return [*row["prompt"], {"role": "assistant", "content": row["completion"]}]


def _encode_thumbs(text, row, max_len, too_long=None):
    """A Thumbs of at most max_len tokens, cut as a Ranking is."""
    prompt, answers, truncated = _cut_answers(text, row, max_len)
    return Thumbs(prompt, answers, [row["label"]]), truncated


def _cut_answers(text, row, max_len):
    """(prompt, answers, whether anything was cut) as ids, at most max_len for a prompt with any answer:
    answers are cut right, then the prompt left."""
    row_type = row_type_of(row)
    prompt = text.prompt_ids(row)
    answers = [chat.answer(answer, text.template, text.tokenizer) for answer in row_type.answers(row)]
    answer_len = max(max_len // 2, max_len - len(prompt))
    kept = [ids[:answer_len] for ids in answers]
    prompt_len = max_len - max(len(ids) for ids in kept)
    truncated = kept != answers or len(prompt) > prompt_len
    return chat.truncate_left(prompt, prompt_len, text.start_length), kept, truncated


def distinct(text, row, max_len):
    """A preference without the answers that are, as tokens, a better one again: " X" and "X", or two that are
    cut before they differ. None if that leaves no comparison. Other rows stay as they are."""
    row_type = row_type_of(row)
    if row_type.select is None:
        return row
    # tokens hold a byte or more, so answers that differ here differ in the half of max_len that they are left
    starts = [unicodedata.normalize("NFKC", answer).strip().encode()[:max_len // 4]
              for answer in row_type.answers(row)]
    if len(set(starts)) == len(starts):
        return row
    _, answers, _ = _cut_answers(text, row, max_len)
    ranks = row_type.ranks(row)
    kept = [i for i in range(len(answers))
            if not any(answers[j] == answers[i] and ranks[j] < ranks[i] for j in range(i))]
    return row if len(kept) == len(answers) else row_type.select(row, kept)


def _encode_ranking(text, row, max_len, too_long=None):
    prompt, answers, truncated = _cut_answers(text, row, max_len)
    return Ranking(prompt, answers, row_type_of(row).ranks(row)), truncated


# ---- the records -------------------------------------------------------------------------------------------
class RowType(typing.NamedTuple):
    """What the code needs to know of a row type. text is a Text (examples.py)."""
    name: str
    keys: frozenset                             # a row has them all; of two matches the one with more keys
    turns: typing.Callable = None               # (text, row) -> messages that end with the answer
    references: typing.Callable = None          # (text, row) -> answers that count as correct
    encode: typing.Callable = None              # (text, row, max_len, too_long) -> example or None, truncated
    answers: typing.Callable = None             # preferences: row -> answers, best first
    ranks: typing.Callable = None               # preferences: row -> their ranks, smaller is better
    select: typing.Callable = None              # (row, places of answers) -> the row with those only, or None


def _label_references(text, row):
    return [row["label"]]


ROW_TYPES = {row_type.name: row_type for row_type in (
    RowType("text", frozenset({"text"})),
    RowType("label", frozenset({"text", "label"}), _label_turns, _label_references, _encode_label),
    RowType("tags", frozenset({"tokens", "tags"}), _tags_turns, _tags_references, _encode_tags),
    RowType("chat", frozenset({"messages"}), _chat_turns, _chat_references, _encode_answer),
    RowType("pairs", frozenset({"prompt", "chosen", "rejected"}), _preference_turns, _preference_references,
            _encode_ranking, _pair_answers, _pair_ranks, _select_pair),
    RowType("ranked", frozenset({"prompt", "responses", "rank"}), _preference_turns, _preference_references,
            _encode_ranking, _ranked_answers, _ranked_ranks, _select_ranked),
    RowType("thumbs", frozenset({"prompt", "completion", "label"}), _thumb_turns, _thumb_references,
            _encode_thumbs, _thumb_answers),
    RowType("prompt", frozenset({"prompt"}), _preference_turns, _preference_references, _encode_ranking,
            _no_answers, _pair_ranks),
)}


def row_type_of(row):
    """The RowType of a row, by its keys. Raises DataError for a row of no known type."""
    matching = [row_type for row_type in ROW_TYPES.values() if row_type.keys <= row.keys()]
    if not matching:
        raise DataError(f"{_location(row)}: no row type has the keys {', '.join(row)}; known types are "
                        + ", ".join(ROW_TYPES))
    return max(matching, key=lambda row_type: len(row_type.keys))
