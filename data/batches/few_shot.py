"""data/batches/few_shot.py: solved examples in front of a question (--shots), as many as the context holds.

    fit_shots     the oldest examples are dropped, whole, until question and answer fit; a question that is
                  too long by itself is cut on the left
    shot_ladder   the same evaluation for each number of --shots, up to the first that fits no question

The metric "shots_used" is the mean number of examples that stood in front of a question, "shots_used_max" the
largest. While shots_used equals the number requested, two lines of the table compare numbers of shots; where
it is smaller, they compare what the context holds. Such a ladder is figure 1.2 of Brown et al. 2020 (arXiv
2005.14165).

Public: parse_shots, fit_shots, shot_ladder, print_ladder
"""
from dataclasses import dataclass

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


def shot_ladder(numbers, evaluate, first_metrics):
    """Evaluate each number of shots.

    evaluate(n) -> (metrics, answers); first_metrics: the metrics of numbers[0], which are known already.
    Returns ([(n, metrics)], the answers of the last evaluation).
    """
    rungs = [(numbers[0], first_metrics)]
    answers = None
    for n in numbers[1:]:
        with Progress(f"test with {n} shots"):
            metrics, answers = evaluate(n)
        rungs.append((n, metrics))
        log_progress(f"--shots {n}  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        if metrics["shots_used_max"] < n:
            log_progress(f"no question has more than {metrics['shots_used_max']} examples in front of it, "
                         "because the context or the data ends there; larger numbers of shots are skipped")
            break
    return rungs, answers


def print_ladder(rungs):
    """Print [(n, metrics)] as a table; returns {"METRIC_n_shots": value} of the main metric."""
    last_metrics = rungs[-1][1]
    names = [name for name in last_metrics if name not in ("targets", "shots_used_max")]
    print_result(f"{'shots':>6}" + "".join(f"{name:>13}" for name in names))
    for n, metrics in rungs:
        cells = [f"{metrics[name]:13.4f}" if name in metrics else " " * 13 for name in names]
        print_result(f"{n:6}" + "".join(cells))
    print_result()
    main = names[0]
    return {f"{main}_{n}_shots": metrics[main] for n, metrics in rungs}
