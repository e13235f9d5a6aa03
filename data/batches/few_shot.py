"""data/batches/few_shot.py: solved examples in front of a question (--shots), as many as the context holds.

    fit_shots     the oldest examples are dropped, whole, until question and answer fit; a question that is
                  too long by itself is cut on the left
    shot_ladder   the same evaluation for each number of --shots, up to the first that fits no question

The metric "shots_used" is the mean number of examples that stood in front of a question, "shots_used_max" the
largest. While shots_used equals the number requested, two lines of the table compare numbers of shots; where
it is smaller, they compare what the context holds. The result of a ladder is its best rung, the one with the
highest main metric, "shots" its number; being chosen on the test items, it is a little too high. Such a
ladder is figure 1.2 of Brown et al. 2020 (arXiv 2005.14165).

Public: parse_shots, fit_shots, Rung, shot_ladder, best_rung, print_ladder
"""
from dataclasses import dataclass
from typing import NamedTuple

from data.runtime.files import UserError
from data.runtime.flags import flag
from data.runtime.progress import Progress
from data.runtime.run_folder import log_progress, print_result


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
    hard_limit = ctx.max_text_len() - 1                 # the answer has at least one token
    limit = ctx.max_prompt_len()
    if "label" in row:
        if ctx.head is None:                            # every label must fit behind the question
            hard_limit = ctx.max_text_len() - max(map(len, text.label_answers()))
        limit = hard_limit
    if shots and len(ids) > limit:
        count = _most_that_fit(text, row, shots, limit)
        shots = shots[len(shots) - count:]
        ids = text.prompt_ids(row, shots)
    if len(ids) > hard_limit:
        ids = text.prompt_ids(row, shots, hard_limit)
    return ids, len(shots)


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


class Rung(NamedTuple):
    """A number of shots and what was measured with it; the main metric is the first one."""
    shots: int
    metrics: dict
    answers: list                                       # of the first rung only the first ones may be known
    item_correct: str = ""


def shot_ladder(numbers, evaluate, first):
    """Evaluate each number of shots: a list of Rungs.

    evaluate(n) -> Rung; first: the Rung of numbers[0], which is known already.
    """
    rungs = [first]
    for n in numbers[1:]:
        with Progress(f"test with {n} shots"):
            rung = evaluate(n)
        rungs.append(rung)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in rung.metrics.items())
        log_progress(f"--shots {n}  {shown}")
        most = rung.metrics["shots_used_max"]
        if most < n:
            log_progress(f"no question has more than {most} examples in front of it, because the context or the "
                         "data ends there; larger numbers of shots are skipped")
            break
    return rungs


def main_metric(rungs):
    return next(name for name in rungs[-1].metrics if name not in COUNTS)


COUNTS = ("targets", "shots_used", "shots_used_max")    # metrics that are no quality


def best_rung(rungs):
    """The Rung with the highest main metric; of equal ones that with the fewest shots.

    Its metrics are joined by "shots", and by "METRIC_n_shots" of every rung.
    """
    main = main_metric(rungs)
    best = max(rungs, key=lambda rung: (rung.metrics[main], -rung.shots))
    ladder = {f"{main}_{rung.shots}_shots": rung.metrics[main] for rung in rungs}
    return best._replace(metrics={**best.metrics, "shots": best.shots, **ladder})


def print_ladder(rungs):
    """Print Rungs as a table, the best one marked, and what the numbers of examples and labels mean."""
    names = [name for name in rungs[-1].metrics if name not in ("targets", "shots_used_max")]
    best = best_rung(rungs).shots
    print_result(f"{'shots':>6}" + "".join(f"{name:>13}" for name in names))
    for rung in rungs:
        cells = [f"{rung.metrics[name]:13.4g}" if name in rung.metrics else " " * 13 for name in names]
        mark = f"  best {main_metric(rungs)}" if rung.shots == best else ""
        print_result(f"{rung.shots:6}{''.join(cells)}{mark}".rstrip())
    short = [rung for rung in rungs if rung.metrics.get("shots_used", rung.shots) < rung.shots]
    if short:
        print_result("shots_used is the mean number of examples that fitted in front of a question; where it "
                     "is below shots, the context held no more.")
    same = [str(rung.shots) for rung in rungs if rung.metrics.get("labels_used") == 1]
    if same:
        print_result(f"With {', '.join(same)} shots every answer is the same label: this accuracy is the share "
                     "of that label in the test items.")
    print_result()
