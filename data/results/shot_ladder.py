"""data/results/shot_ladder.py: one evaluation for each number of --shots, up to the first that fits no question.

While the metric shots_used equals the number requested, two lines of the table compare numbers of shots; where
it is smaller, they compare what the context holds. The result of a ladder is its best rung, the one with the
best main metric, "shots" its number; being chosen on the test items, it is a little too high. Such a ladder is
figure 1.2 of Brown et al. 2020 (arXiv 2005.14165).

Public: Rung, shot_ladder, best_rung, print_ladder
"""
from typing import NamedTuple

from data.results.layout import print_wrapped
from data.results.metrics import HIDDEN, LOWER_IS_BETTER, main_metric
from data.runtime.progress import Progress
from data.runtime.run_folder import log_progress, print_result


class Rung(NamedTuple):
    """A number of shots and what was measured with it."""
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


def best_rung(rungs, own=None):
    """The Rung with the best main metric; of equal ones that with the fewest shots.

    own: as main_metric takes it. Its metrics are joined by "shots", and by "METRIC_n_shots" of every rung.
    """
    main = main_metric(rungs[-1].metrics, own)
    sign = -1 if main in LOWER_IS_BETTER else 1
    best = max(rungs, key=lambda rung: (sign * rung.metrics[main], -rung.shots))
    ladder = {f"{main}_{rung.shots}_shots": rung.metrics[main] for rung in rungs}
    return best._replace(metrics={**best.metrics, "shots": best.shots, **ladder})


def print_ladder(rungs, own=None):
    """Print Rungs as a table, the best one marked, and what the numbers of examples and labels mean."""
    names = [name for name in rungs[-1].metrics if name not in (*HIDDEN, "shots_used_max")]
    main = main_metric(rungs[-1].metrics, own)
    best = best_rung(rungs, own).shots
    widths = [max(8, len(name)) + 2 for name in names]
    print_result(f"{'shots':>6}" + "".join(f"{name:>{width}}" for name, width in zip(names, widths)))
    for rung in rungs:
        cells = [f"{rung.metrics[name]:{width}.4g}" if name in rung.metrics else " " * width
                 for name, width in zip(names, widths)]
        mark = f"  best {main}" if rung.shots == best else ""
        print_result(f"{rung.shots:6}{''.join(cells)}{mark}".rstrip())
    short = [rung for rung in rungs if rung.metrics.get("shots_used", rung.shots) < rung.shots]
    if short:
        print_wrapped("shots_used is the mean number of examples that fitted in front of a question; where it "
                      "is below shots, the context held no more.")
    same = [str(rung.shots) for rung in rungs if rung.metrics.get("labels_used") == 1]
    if same:
        print_wrapped(f"With {', '.join(same)} shots every answer is the same label: this accuracy is the share "
                      "of that label in the test items.")
    print_result()
