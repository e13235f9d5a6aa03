"""data/results/compare.py: the paired difference A - B of two groups of runs, `--task table --compare A B`.

pairs       runs with the same seed and the same value of every field of --by that neither A nor B fixes. On
            paired runs the noise that both sides share (data order, test items) cancels
by seed     mean over the pairs, with a 95 % interval: Student's t over pairs
by item     for a proportion of test items, from result.json's "item_correct", and for pass@k, mean@n and
            majority@n, from its "generations": the difference of each item, averaged over the pairs; its
            mean, Student's t over items, and the two-sided sign test over the items that differ
test items  all pairs have the same ones: item 3 of one test set is never averaged with item 3 of another
code        a field: `code=ab12` selects it. Unless A or B fixes it, runs of different code are never paired.
            Pairs of more than one code are an error, and sides of different code are reported in a line

Public: compare, select, seed_difference, item_differences, format_interval, sign_test
"""
import math

from data.results.metrics import summary
from data.results.runs import (MISSING, VERSION_FIELDS, display_value, field_value, group, item_values, known_fields,
                               lower_is_better, measured_differently, metric_values, test_set)
from data.runtime.files import UserError


def compare(runs, a, b, fields, metric):
    """A - B as lines of text. a, b: what `select` takes; fields: those of --by.

    Raises UserError when a side is ambiguous, when there is no pair, or when a pair was measured differently.
    """
    runs_a, fixed_a = select(runs, a, fields)
    runs_b, fixed_b = select(runs, b, fields)
    fixed = {**fixed_a, **fixed_b}
    both = runs_a + runs_b
    open_fields = [f for f in fields if f not in fixed and (f in VERSION_FIELDS or all(
        field_value(run, f) is not None for run in both))]
    side_a = one_per_key(runs_a, a, [*open_fields, "seed"], metric)
    side_b = one_per_key(runs_b, b, [*open_fields, "seed"], metric)
    pairs = [(side_a[key], side_b[key]) for key in side_a if key in side_b]
    check_pairs(pairs, both, a, b, metric)

    direction = "less" if lower_is_better(metric) else "more"
    head = f"{a} - {b}, {metric} ({direction} is better), pairs of runs: {len(pairs)}"
    unpaired = len(side_a) + len(side_b) - 2 * len(pairs)
    if unpaired:
        head += f", runs without a partner: {unpaired}"
    lines = [head, by_seed(pairs, metric), by_item(pairs, metric)]
    code_a, code_b = (display_value(field_value(run, "code")) for run in pairs[0])      # as in all pairs
    if code_a != code_b:
        lines.append(f"  code     {code_a} - {code_b}: the two sides were computed by different code")
    return lines


def select(runs, text, fields):
    """(runs, {field: value}) of `rank=8`, `method=lora,rank=8`, or `lora`, a value of one of `fields`.

    Raises UserError when a part is a value of no field, or of several.
    """
    fixed = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        candidates = [name] if equals else fields
        matching = [f for f in candidates if any(is_called(run, f, value) for run in runs)]
        if len(matching) != 1:
            known = "; ".join(f"{f}: {' '.join(displayed_values(runs, f))}" for f in fields)
            raise UserError(f"--compare {text}: {part} is the value of {len(matching)} fields; there is "
                            f"{known}")
        fixed[matching[0]] = value
    selected = [run for run in runs if all(is_called(run, f, value) for f, value in fixed.items())]
    return selected, fixed


def is_called(run, field, text):
    """Whether a run's field is shown as this text, or is this path."""
    value = field_value(run, field)
    return text == display_value(value) or text == value


def displayed_values(runs, field):
    return sorted({display_value(field_value(run, field)) for run in runs})


def one_per_key(runs, text, fields, metric):
    """{values of the fields: run} of the runs that have the metric. Raises UserError for two runs a key."""
    side = {}
    for key, same in group([run for run in runs if metric_values([run], metric)], fields).items():
        if len(same) > 1:
            first, second = same[:2]
            hint = next((f"{f}={display_value(field_value(first, f))}" for f in known_fields(same)
                         if field_value(first, f) != field_value(second, f)), "seed=1")
            raise UserError(f"--compare {text} means both {first['folder']} and {second['folder']}; select "
                            f"one, as {text},{hint}")
        side[key] = same[0]
    return side


def check_pairs(pairs, runs, a, b, metric):
    """Raises UserError when there is no pair, when pairs mix codes, or one was measured differently."""
    codes = displayed_values(runs, "code")
    if not pairs:
        hint = ""
        if len(codes) > 1:
            hint = f". Their code differs ({' '.join(codes)}); code=... on both sides compares them anyway"
        raise UserError(f"--compare {a} {b}: no two runs have the same seed and both have {metric}{hint}")
    if len({(field_value(x, "code"), field_value(y, "code")) for x, y in pairs}) > 1:
        raise UserError(f"--compare {a} {b} has pairs of different code ({' '.join(codes)}); select one, as "
                        f"{a},code={codes[-1]}")
    for x, y in pairs:
        names = measured_differently([x, y], metric)
        if names == ["test"]:
            raise UserError(f"{x['folder']} and {y['folder']} were measured on different test items; a "
                            "paired difference needs the same ones")
        if names:
            raise UserError(f"{metric} means something else in {x['folder']} than in {y['folder']}, because "
                            f"{', '.join(names)} differs; name another --metric")
    tests = dict.fromkeys(x["config"]["test"] for x, _ in pairs)
    if len({test_set(x) for x, _ in pairs}) > 1:
        raise UserError(f"--compare {a} {b} has pairs of different test items ({', '.join(tests)}); select one by "
                        "--runs")


def seed_difference(pairs, metric):
    """(mean, sd, half) of the difference over pairs of runs; the 95 % interval is mean +- half."""
    return summary(metric_values([x], metric)[0] - metric_values([y], metric)[0] for x, y in pairs)


def item_differences(pairs, metric):
    """The difference of each test item, a mean over the pairs; None where the runs keep no outcomes."""
    outcomes = [(item_values(x, metric), item_values(y, metric)) for x, y in pairs]
    if not all(x and y and len(x) == len(y) for x, y in outcomes):
        return None
    return [sum(x[i] - y[i] for x, y in outcomes) / len(pairs) for i in range(len(outcomes[0][0]))]


def format_interval(mean, half):
    return f"[{mean - half:+.4f}, {mean + half:+.4f}]" if math.isfinite(half) else MISSING


def by_seed(pairs, metric):
    """One line: the mean difference over pairs and its interval."""
    mean, sd, half = seed_difference(pairs, metric)
    if len(pairs) < 2:
        return f"  by seed  {mean:+.4f} (one pair has no interval)"
    return f"  by seed  {mean:+.4f} ± {sd:.4f}  95 % {format_interval(mean, half)}, Student's t over pairs"


def by_item(pairs, metric):
    """One line: the mean difference over test items, its interval and the sign test."""
    differences = item_differences(pairs, metric)
    if differences is None:
        return f"  by item  unknown: the runs keep no outcome per item for {metric}"
    mean, _, half = summary(differences)
    better = sum(d > 0 for d in differences)
    worse = sum(d < 0 for d in differences)
    return (f"  by item  {mean:+.4f}           95 % {format_interval(mean, half)}, t over {len(differences)} items; "
            f"better on {better}, worse on {worse}, sign test p {sign_test(better, worse):.2g}")


def sign_test(better, worse):
    """Two-sided p-value: how often fair coins fall at least as unevenly."""
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(max(better, worse), n + 1))
    return min(1.0, 2 * tail / 2 ** n)
