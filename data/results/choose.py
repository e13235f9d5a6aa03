"""data/results/choose.py: --task table --select FLAG. A value of a flag for each group, chosen on valid.

Methods compared at one learning rate each are ranked by how well that rate suits them. Here each group, as
each method, gets the value that suits it best, and its number is not favoured by the choice:

choosing    The value whose metric on valid is best, a mean over the seeds that choose; of equally good ones
            the smallest. The first half of a group's seeds chooses, rounded down, at least one; only seeds
            that ran the whole grid, or as much of it as any seed did.
reported    The metric on test of the chosen value, mean ± sd over the other seeds. The best of several noisy
            numbers is too good, because part of it is luck: of the items, which test does not share with
            valid, and of the seeds, which the other seeds do not share (Cawley & Talbot 2010, JMLR 11).
            So the grid with one seed and the chosen value with some more are enough.
            A group without another seed reports the seeds that chose; a note says so.
regret      By how much valid is worse at the next smaller and the next larger value. Where it is large, a
            finer grid may find a better value; where it is small, the choice hardly matters.
difference  To the group that is best on test, paired by seed: data/results/compare.py.

Valid is the measurement of the weights that were saved (runs.valid_metrics), of at most 100 rows. --on test
chooses on the test items themselves, for runs that measure nothing on valid (RL); other seeds report.

Public: Choice, check_select, fields_of, choose, badness, print_choices
"""
import math
from typing import NamedTuple

from data.results.compare import format_interval, item_differences, seed_difference
from data.results.layout import (Column, left_out_columns, print_columns, print_left_out_columns, print_wrapped,
                                 terminal_width)
from data.results.log_plots import group_label
from data.results.metrics import summary
from data.results.resources import resource_columns
from data.results.runs import (MISSING, NO_SETTINGS, VERSION_FIELDS, by_test_set, did_you_mean, display_value,
                               display_values, distinguishing_fields, estimate, field_value, format_estimate, group,
                               group_fields, known_fields, lower_is_better, measured_differently,
                               metric_values, mixed_fields, settings_of, sort_key, valid_metrics)
from data.runtime.files import UserError
from data.runtime.run_folder import print_result

SPLITS = ("valid", "test")                              # what --on takes


class Choice(NamedTuple):
    """What was chosen for a group."""
    key: tuple                  # values of the fields of --by
    value: object               # the chosen one
    scores: dict                # {value: metric that chose, a mean over the choosing seeds}, upwards
    equal: list                 # the values that are as good as the chosen one, itself included
    not_chosen_from: list       # values of the grid that no choosing seed ran
    choosing: list              # the seeds that chose
    reported: list              # the runs whose test counts
    favoured: bool              # these are runs of the seeds that chose between several values


def check_select(runs, by, select):
    """Raises UserError where `select` is no flag that can be chosen."""
    settings = settings_of(runs)
    if select in NO_SETTINGS or select in VERSION_FIELDS:
        raise UserError(f"--select {select}: it is no flag that is chosen for a run; name one, as lr")
    if select not in settings:
        raise UserError(f"--select {select} is no flag of these runs{did_you_mean(select, settings)}")
    if by and select in by.split(","):
        raise UserError(f"--select {select} with --by {by}: a flag is either chosen or tells groups apart; "
                        "leave it out of one")


def fields_of(runs, by, select):
    """The fields that make groups: those of --by, or those in which runs differ beside the selected flag."""
    requested = [name for name in by.split(",") if name in known_fields(runs)] if by else None
    return group_fields(runs, requested or distinguishing_fields(runs, without=select))


# --------------------------------------------------------------------------------------------------- choosing

def choose(key, runs, select, metric, split):
    """The Choice of a group; runs have the metric. Raises UserError where they do not allow one."""
    cells = {}
    for cell, same in group(runs, [select, "seed"]).items():
        if len(same) > 1:
            raise UserError(two_runs(same, select))
        cells[cell] = same[0]
    choosing, ran = choosing_seeds(cells)
    grid = sorted({value for value, _ in cells}, key=sort_key)
    candidates = [value for value in grid if value in ran]
    check_same_measure([cells[value, seed] for value in candidates for seed in choosing], select, metric, split)
    scores = {}
    for value in candidates:
        numbers = [score_of(cells[value, seed], metric, split, len(candidates) > 1) for seed in choosing]
        scores[value] = summary(numbers)[0]
    ranks = {value: badness(score, metric) for value, score in scores.items()}
    equal = [value for value in candidates if ranks[value] == min(ranks.values())]
    others = [run for (value, seed), run in cells.items() if value == equal[0] and seed not in choosing]
    reported = others or [cells[equal[0], seed] for seed in choosing]
    return Choice(key, equal[0], scores, equal, [value for value in grid if value not in ran], choosing,
                  reported, not others and len(grid) > 1)


def choosing_seeds(cells):
    """(the seeds that choose, the values that each of them ran). cells: {(value, seed): run}."""
    ran = {}
    for value, seed in cells:
        ran.setdefault(seed, set()).add(value)
    seeds = sorted(ran, key=sort_key)
    most = max((ran[seed] for seed in seeds), key=len)
    complete = [seed for seed in seeds if ran[seed] == most]
    return complete[:max(1, len(seeds) // 2)], most


def score_of(run, metric, split, needed):
    """The number that chooses; nan where it is not there and not needed. Raises UserError."""
    if split == "test":
        return metric_values([run], metric)[0]
    found = valid_metrics(run)
    if metric not in found and needed:
        raise UserError(without_valid(run, metric, found))
    return found.get(metric, math.nan)


def without_valid(run, metric, found):
    """Why a run has no number on valid, in one sentence."""
    where = f"{run['folder']} has no {metric} on valid"
    if found:
        return (f"{where}, where it has {', '.join(found)}; name one of these by --metric, or choose by "
                "--on test")
    if not run["result"].get("steps"):
        return f"{where}, because it made no step (--steps); choose by --on test"
    if "eval_every" not in run["config"]:
        return f"{where}, because --task {field_value(run, 'task')} measures none; choose by --on test"
    return (f"{where} at its last step; run it again with --fresh --eval_every "
            f"{run['result']['steps']}, or choose by --on test")


def badness(score, metric):
    """Small for good numbers; a number that is not there is the worst."""
    if math.isnan(score):
        return math.inf
    return score if lower_is_better(metric) else -score


def two_runs(runs, select):
    """Two runs of one group, value and seed: what to do, in one sentence."""
    first, second = runs[:2]
    names = [name for name in settings_of(runs) if field_value(first, name) != field_value(second, name)]
    return (f"--select {select}: {first['folder']} and {second['folder']} differ in "
            f"{', '.join(names) or 'their folder'} and stand in one group; "
            + (f"add {names[0]} to --by" if names else "select one by --runs"))


def check_same_measure(runs, select, metric, split):
    """Raises UserError where one of the numbers that choose means something else than another one."""
    names = measured_differently(runs, metric)
    if names:
        raise UserError(f"--select {select}: {metric} means something else in some of these runs, because "
                        f"{', '.join(names)} differs; name another --metric")
    if split == "valid" and len({run.get("data_sha256") for run in runs}) > 1:
        other = next(run for run in runs if run.get("data_sha256") != runs[0].get("data_sha256"))
        raise UserError(f"--select {select}: {runs[0]['folder']} and {other['folder']} were measured on other "
                        "items of valid, because their data differ; add data to --by")


# --------------------------------------------------------------------------------------------------- printing

def print_choices(runs, metrics_of, cfg):
    """A table for each test set, and below it what to know of it. Returns the Choices of all tables.

    metrics_of(runs): the metrics to show; the first one chooses. Raises UserError.
    """
    tests = by_test_set(runs)
    every = []
    nothing = {}                                        # {test set without a choice: how many runs}
    for name, some in tests.items():
        metrics = metrics_of(some)
        having = [run for run in some if metrics and metric_values([run], metrics[0])]
        fields = fields_of(some, cfg.by, cfg.select)
        choices = [choose(key, same, cfg.select, metrics[0], cfg.on)
                   for key, same in group(having, fields).items()]
        if all(len(grid_of(choice)) < 2 for choice in choices):
            nothing[name] = len(some)
            continue
        every += choices
        choices.sort(key=lambda choice: badness(estimate(choice.reported, metrics[0])[0], metrics[0]))
        if len(tests) > 1:
            print_result(f"{name}:" + "\n" * cfg.markdown)
        columns = table(choices, fields, metrics, cfg)
        print_columns(columns, cfg.markdown)
        print_result()
        dropped = [] if cfg.markdown else left_out_columns(columns, terminal_width())
        print_left_out_columns(column.title for column in dropped)
        print_wrapped(f"{name}; {legend(choices, fields, metrics, cfg)}")
        if len(having) < len(some):
            print_wrapped(f"Runs without {metrics[0]}, which are not in this table: {len(some) - len(having)}.")
        for sentence in notes(choices, fields, having, metrics[0], cfg):
            print_wrapped(sentence)
        print_differences(choices, fields, metrics[0], cfg.markdown)
    if not every:
        fields = fields_of(runs, cfg.by, cfg.select)
        raise UserError(f"--select {cfg.select}: no group of --by {','.join(fields)} has measured runs of more "
                        "than one value, so there is nothing to choose")
    for name, count in nothing.items():
        print_wrapped(f"Not shown: runs on {name}, {count}, because no group of them has more than one value of "
                      f"{cfg.select}.")
    return every


def words(values):
    return " ".join(map(display_value, values))


def grid_of(choice):
    """All values of the group, upwards."""
    return sorted([*choice.scores, *choice.not_chosen_from], key=sort_key)


def table(choices, fields, metrics, cfg):
    """The Columns, a row for each Choice."""
    columns = key_columns(choices, fields)
    columns.append(Column(cfg.select, [display_value(choice.value) for choice in choices]))
    scores = [choice.scores[choice.value] for choice in choices]
    largest = max((abs(score) for score in scores if math.isfinite(score)), default=0)
    decimals = 5 if 0 < largest < 0.1 else 3
    columns.append(Column(f"on {cfg.on}", cells_of(scores, decimals)))
    if is_ordered(choices):
        for title, step in (("below", -1), ("above", 1)):
            regrets = [regret(choice, step, metrics[0]) for choice in choices]
            columns.append(Column(title, cells_of(regrets, decimals), 1))
    columns.append(Column("seeds", [str(len(choice.reported)) for choice in choices]))
    for metric in metrics:
        estimates = [estimate(choice.reported, metric) for choice in choices]
        cells = [format_estimate(some) if math.isfinite(some[0]) else ("nan", MISSING) for some in estimates]
        means, intervals = zip(*cells)
        columns.append(Column(metric, list(means)))
        if any(interval != MISSING for interval in intervals):
            columns.append(Column("95 %", list(intervals), 2))
    return columns + resource_columns([choice.reported for choice in choices], without=(*fields, cfg.select))


def key_columns(choices, fields):
    return [Column(name, display_values([choice.key[i] for choice in choices]))
            for i, name in enumerate(fields) if name != "folder"]


def cells_of(numbers, decimals):
    return [MISSING if math.isnan(x) else f"{x + 0.0:.{decimals}f}" for x in numbers]


def is_ordered(choices):
    """Whether all values are numbers, so that there are next smaller and next larger ones."""
    values = [value for choice in choices for value in grid_of(choice) if value is not None]
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def regret(choice, step, metric):
    """How much worse the number that chose is at the next smaller (-1) or larger (1) value; nan without one."""
    values = list(choice.scores)
    position = values.index(choice.value) + step
    if not 0 <= position < len(values):
        return math.nan
    return badness(choice.scores[values[position]], metric) - badness(choice.scores[choice.value], metric)


def legend(choices, fields, metrics, cfg):
    """What the columns are."""
    seeds = {choice.key: f"seed{'s' if len(choice.choosing) > 1 else ''} {words(choice.choosing)}"
             for choice in choices if len(grid_of(choice)) > 1}
    chose = next(iter(seeds.values()))
    if len(set(seeds.values())) > 1:
        chose = "; ".join(f"{some} of {group_label(key, fields)}" for key, some in seeds.items())
    text = f"{cfg.select}: the best by {metrics[0]} on {cfg.on}, {chose}"
    if is_ordered(choices):
        text += f"; below, above: how much worse it is there at the next {cfg.select}"
    return (f"{text}. {', '.join(metrics)}: on test, mean ± sd over the other seeds, 95 % by Student's t; of "
            "a single run over test items.")


def notes(choices, fields, runs, metric, cfg):
    """Sentences about what makes the choices of a table less fair."""
    select = cfg.select
    out = []
    if cfg.on == "test":
        out.append("Chosen on the items that are reported, so their luck favours every number here.")
    for choice in choices:
        label = group_label(choice.key, fields)
        if math.isinf(badness(choice.scores[choice.value], metric)) and len(grid_of(choice)) > 1:
            out.append(f"{label}: {metric} on {cfg.on} is finite at no {select}, so nothing was chosen; the "
                       "smallest stands.")
        else:
            if len(choice.equal) > 1:
                out.append(f"{label}: equally good on {cfg.on} are {select} {words(choice.equal)}; the smallest "
                           "stands.")
            out += edge_note(choice, label, select)
        if choice.not_chosen_from:
            out.append(f"{label}: {select} {words(choice.not_chosen_from)} could not be chosen, because no "
                       "seed that chooses ran it.")
    favoured = [group_label(choice.key, fields) for choice in choices if choice.favoured]
    if favoured:
        who = "any group" if 1 < len(favoured) == len(choices) else "; ".join(favoured)
        out.append(f"No other seed ran the chosen {select} of {who}, so the number is that of the seeds that "
                   "chose, and favoured by the choice; run it with another --seed, too.")
    return out + differing_grids(choices, fields, select) + differing_seeds(choices, fields) + mixed_note(
        choices, fields, runs, select)


def edge_note(choice, label, select):
    """A sentence for each end of the grid that is best, or as good as the best."""
    grid = grid_of(choice)
    if len(grid) < 2 or not is_ordered([choice]):
        return []
    ends = ((grid[0], "smallest", "smaller"), (grid[-1], "largest", "larger"))
    return [f"{label}: {select} {display_value(value)} is the {which} that was tried; a {other} one may be better."
            for value, which, other in ends if value in choice.equal]


def differing_grids(choices, fields, select):
    """A note where groups had different values to choose from."""
    grids = [tuple(grid_of(choice)) for choice in choices]
    if len(set(grids)) < 2:
        return []
    if len(set(map(len, grids))) == 1:
        return [f"Groups chose from different values of {select}, {len(grid_of(choices[0]))} each."]
    return [f"Groups chose from different numbers of values of {select}, and more values are more chances: "
            + "; ".join(f"{len(grid)} {group_label(choice.key, fields)}" for choice, grid in zip(choices, grids)) + "."]


def differing_seeds(choices, fields):
    """A note where groups report different numbers of seeds."""
    if len({len(choice.reported) for choice in choices}) < 2:
        return []
    return ["Groups report different numbers of seeds: " + "; ".join(
        f"{len(choice.reported)} {group_label(choice.key, fields)}" for choice in choices) + "."]


def mixed_note(choices, fields, runs, select):
    """A note where another flag varies together with the selected one."""
    mixed = [name for name in mixed_fields(runs, group(runs, fields)) if name != select]
    if not mixed:
        return []
    finer = ",".join([*fields, mixed[0]])
    return [f"Beside {select}, {', '.join(mixed)} differs inside groups; --by {finer} tells them apart."]


def print_differences(choices, fields, metric, markdown):
    """A row for each group but the first, which is the best: its paired difference to that one."""
    first, *others = choices
    names = measured_differently([run for choice in choices for run in choice.reported], metric)
    if names:
        print_wrapped(f"{metric}: not the same in all rows, because {', '.join(names)} differs; no "
                      "differences.")
        return
    if not others:
        return
    pairs = [pairs_of(choice, first) for choice in others]
    columns = key_columns(others, fields)
    columns.append(Column("pairs", [str(len(some)) for some in pairs]))
    differences = [seed_difference(some, metric) for some in pairs]
    means = [MISSING if math.isnan(mean) else f"{mean:+.4f}" for mean, *_ in differences]
    columns.append(Column("difference", means))
    columns.append(Column("95 %, over seeds", [format_interval(mean, half) for mean, _, half in differences]))
    by_item = [item_differences(some, metric) if some else None for some in pairs]
    if any(by_item):
        over_items = [summary(some or ()) for some in by_item]
        columns.append(Column("95 %, over items", [format_interval(mean, half) for mean, _, half in over_items]))
    better = "less" if lower_is_better(metric) else "more"
    print_result()
    print_wrapped(f"{metric} against {group_label(first.key, fields)}, paired by seed ({better} is better):")
    if markdown:
        print_result()
    print_columns(columns, markdown)


def pairs_of(choice, other):
    """Pairs of reported runs of one seed."""
    partner = {field_value(run, "seed"): run for run in other.reported}
    return [(run, partner[field_value(run, "seed")]) for run in choice.reported
            if field_value(run, "seed") in partner]
