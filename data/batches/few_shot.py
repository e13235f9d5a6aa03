"""data/batches/few_shot.py: solved examples in front of a question (--shots), as many as the context holds.

    fit_shots     the oldest examples are dropped, whole, until question and answer fit; a question that is
                  too long by itself is cut on the left

The metric "shots_used" is the mean number of examples that stood in front of a question, "shots_used_max" the
largest. Several numbers of shots are a ladder (data/results/shot_ladder.py).

Public: ShotFlags, ROW_TYPES_WITH_SHOTS, parse_shots, fit_shots
"""
from dataclasses import dataclass

from data.text import chat
from data.runtime.files import UserError
from data.runtime.flags import flag


@dataclass(frozen=True)
class ShotFlags:
    """text"""
    shots: str = flag("0", "solved training examples in front of each question; or a list: 0,1,2,4")

    @staticmethod
    def check(cfg):
        parse_shots(cfg.shots)


ROW_TYPES_WITH_SHOTS = ("chat", "label", "tags")


def parse_shots(text, row_type="chat", classifier="lm"):
    """"0,1,2,4" -> [0, 1, 2, 4].

    Raises UserError for anything but a rising list of numbers, and for numbers other than 0 where rows have
    no answers, or where a classifier head reads the label instead of generating it.
    """
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or sorted(set(numbers)) != numbers:
        raise UserError(f"--shots {text} cannot be read; give a number, or a rising list such as 0,1,2,4,8")
    if numbers == [0]:
        return numbers
    if classifier != "lm":
        raise UserError(f"--shots {text} puts examples with answers in front of a question, and this run "
                        "uses a classifier head; use --classifier lm")
    if row_type not in ROW_TYPES_WITH_SHOTS:
        raise UserError(f"--shots {text} puts examples with answers in front of a question, and this run has "
                        f"{row_type} rows; it needs {', '.join(ROW_TYPES_WITH_SHOTS)} rows")
    return numbers


def fit_shots(ctx, row, shots):
    """(ids of the prompt behind as many of the last shots as fit, their number).

    ctx    a ModelContext: max_text_len(), max_prompt_len(), head, text
    shots  rows; the last ones stand next to the question and are kept longest
    """
    text = ctx.text
    ids = text.prompt_ids(row, shots)
    if len(ids) <= ctx.max_text_len() // 2:             # any answer keeps at least the other half
        return ids, len(shots)
    hard_limit = ctx.max_text_len() - _answer_room(ctx, row)
    limit = hard_limit if "label" in row else ctx.max_prompt_len()
    if shots and len(ids) > limit:
        count = _most_that_fit(text, row, shots, limit)
        shots = shots[len(shots) - count:]
        ids = text.prompt_ids(row, shots)
    if len(ids) > hard_limit:
        ids = text.prompt_ids(row, shots, hard_limit)
    return ids, len(shots)


def _answer_room(ctx, row):
    """The tokens that an answer to a question too long for the context needs: those of the longest label, or of the
    longest reference; of the latter at most half the context and --max_new_tokens, as in training."""
    text = ctx.text
    if "label" in row:
        return 1 if ctx.head else max(map(len, text.label_answers()))
    longest = max(len(chat.answer(reference, text.template, text.tokenizer)) for reference in text.references(row))
    return min(longest, ctx.max_new_tokens, ctx.max_text_len() // 2)


def _most_that_fit(text, row, shots, limit):
    """The largest number of last shots with a prompt of at most `limit` tokens, by bisection."""
    low = 0
    high = len(shots) - 1                               # all of them are known not to fit
    while low < high:
        middle = (low + high + 1) // 2
        if len(text.prompt_ids(row, shots[len(shots) - middle:])) <= limit:
            low = middle
        else:
            high = middle - 1
    return low
