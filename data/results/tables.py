"""data/results/tables.py: --task table. Many run folders in tables; optionally a comparison and a plot.

A row is a group of runs (data/results/runs.py) and shows, for each metric, mean ± sd and its 95 % interval.
Runs that were measured on different test items stand in different tables, each under the name of its items.

*           the best row of its table: all rows have an interval there, and that of the best overlaps no other
            (bold in Markdown). None where a metric is defined differently in some rows: a note below names them
--sort      rows ordered by a column, best metric or latest date first, and the folders of each row
--across    a matrix: the values of one field are the columns, and a cell is one number
--select    another table: a value of a flag is chosen for each group on valid (data/results/choose.py)
width       what a terminal has no room for is left out or wrapped (data/results/layout.py)
left out    a folder that looks like a run and is not in the table is listed below it with the reason

Public: TableFlags, show, best, table, matrix
"""
import math
import os
from dataclasses import dataclass

from data.results import choose, plots
from data.results.compare import compare
from data.results.layout import (Column, left_out_columns, print_columns, print_left_out_columns, print_wrapped,
                                 terminal_width)
from data.results.log_plots import group_label, logged_fields
from data.results.resources import RESOURCES, resource_columns, resource_of
from data.results.runs import (MISSING, by_test_set, did_you_mean, display_values, estimate,
                               events, field_value, format_estimate, gather, group, group_fields, known_fields,
                               lower_is_better, main_metric, measured_differently, metric_names, metric_values,
                               mixed_fields, settings_of, sort_key)
from data.runtime.files import UserError
from data.runtime.flags import flag
from data.runtime.run_folder import print_result


@dataclass(frozen=True)
class TableFlags:
    "table"
    runs: list = flag(("out/*",), "run folders, or patterns for them", type=str, nargs="+")
    by: str = flag(None, "fields to group by, as method,rank or folder; default: those in which runs differ",
                   type=str)
    sort: str = flag(None, "the column that orders the rows, folders shown: best (the metric of the task), "
                     "another metric, a field, date, folder, tokens/s ...", type=str)
    across: str = flag(None, "a matrix: a column for each value of this field, and one number a cell, the "
                       "first of --metric that its runs have", type=str)
    metric: str = flag(None, "what to show, as exact_match,loss,before.loss; default: the task's metric",
                       type=str)
    compare: list = flag(None, "paired difference of two groups: lora full, or rank=1 rank=8, or "
                         "method=lora,rank=1 full", type=str, nargs=2)
    select: str = flag(None, "choose a value of this flag for each group, as lr: the best on valid; test is "
                       "reported over other seeds", type=str)
    on: str = flag("valid", "the items that --select chooses on", choices=choose.SPLITS)
    markdown: bool = flag(False, "the table in Markdown")
    plot: str = flag(None, "draw a plot into this .svg, .png or .pdf file", type=str)
    x: str = flag(None, "the plot's axis: step, ranks, sqrt_kl, k, a field, or what runs logged, as tokens; "
                  "default: what fits", type=str)
    y: str = flag(None, "what runs logged, to be drawn against --x, as kl,length", type=str)

    @staticmethod
    def check(cfg):
        if cfg.y and not cfg.plot:
            raise UserError(f"--y {cfg.y} is for a plot; name its file by --plot")
        if "on" in cfg.given and not cfg.select:
            raise UserError(f"--on {cfg.on} says what --select chooses on; name a flag by --select, as lr")
        for name in ("sort", "across"):
            if cfg.select and cfg.get(name):
                raise UserError(f"--select {cfg.select} makes a table of its own, the best group first; leave "
                                f"--{name} out")


def show(cfg):
    """The command: prints the tables of cfg.runs and returns the exit code 0. Raises UserError."""
    runs, left_out = gather(cfg.runs)
    if not runs and not left_out:
        raise UserError(f"--runs {' '.join(cfg.runs)}: no run folder is there; runs are written into "
                        "out/, or where --out points")
    fields = requested_fields(runs, cfg)
    check_metrics(runs, cfg.metric)
    metrics = shown_metrics(runs, cfg.metric)
    if (cfg.compare or cfg.plot) and not metrics:
        raise UserError("no finished run has a metric, so there is nothing to compare or to plot")
    if cfg.plot and (cfg.select or not cfg.by) and len(by_test_set(runs)) > 1:
        tests = ", ".join(by_test_set(runs))
        raise UserError(f"--plot would compare runs on different test items ({tests}); select one by --runs"
                        + ("" if cfg.select else ", or name in --by what tells them apart"))
    choices = []
    if cfg.select and runs:
        choices = print_choices(runs, left_out, cfg)
    elif cfg.across and runs:
        print_matrix(runs, fields, cfg)
    elif runs:
        print_tables(runs, cfg)
    print_kept(runs)
    if cfg.compare:
        compared = [run for choice in choices for run in choice.reported] or runs
        print_result("\n" + "\n".join(compare(compared, *cfg.compare, fields, metrics[0])))
    if left_out:
        print_left_out(left_out)
    if cfg.plot:
        draw_plot(runs, fields, metrics[0], choices, cfg)
        print_result(f"\n{cfg.plot}")
    return 0


def print_choices(runs, left_out, cfg):
    """choose.print_choices; where it raises UserError, the folders that are left out may be the reason."""
    try:
        return choose.print_choices(runs, lambda some: shown_metrics(some, cfg.metric), cfg)
    except UserError:
        if left_out:
            print_left_out(left_out)
        raise


def draw_plot(runs, fields, metric, choices, cfg):
    """The plot of --plot. With --select its axis is that flag unless --x says otherwise."""
    if cfg.select:
        fields = [*fields, cfg.select]
    x = cfg.x or ("step" if cfg.y else cfg.select or plots.choose_axis(group(runs, fields), fields))
    fields = plots.separating_fields(runs, fields, x)
    chosen = {choice.key: choice.value for choice in choices} if x == cfg.select else {}
    plots.draw(cfg.plot, group(runs, fields), fields, metric, x, cfg.y, chosen)


def requested_fields(runs, cfg):
    """The fields of --by, or the default ones, and that of --across. Raises UserError for one no run has."""
    requested = cfg.by and cfg.by.split(",")
    if cfg.select and runs:
        check_fields(runs, requested or ())
        choose.check_select(runs, cfg.by, cfg.select)
        fields = choose.fields_of(runs, cfg.by, cfg.select)
    else:
        fields = group_fields(runs, requested)
    if cfg.across and cfg.across not in fields:
        fields = group_fields(runs, [*fields, cfg.across])
    if runs:
        check_fields(runs, fields)
        if cfg.x not in (None, *plots.SPECIAL_AXES):
            check_fields(runs, [cfg.x], logged_fields([events(run["folder"]) for run in runs]))
        check_sort(runs, cfg.sort)
    return fields


def check_fields(runs, fields, also=()):
    """Raises UserError for a field that no run has, and that is not among `also`."""
    known = [*known_fields(runs), *also]
    for name in fields:
        if name not in known:
            raise UserError(f"{name} is no field of these runs{did_you_mean(name, known)}")


def check_metrics(runs, requested):
    """Raises UserError for a metric of --metric that no run has."""
    present = metric_names(runs)
    for name in requested.split(",") if requested and runs else ():
        if name not in present:
            raise UserError(f"--metric {name}: no run has it; there is {' '.join(sorted(present))}")


def shown_metrics(runs, requested, also=None):
    """The metrics to show, of those there are: --metric, or the main ones and "forgetting"; and `also`."""
    names = [*dict.fromkeys(map(main_metric, runs)), "forgetting"]
    if requested:
        names = requested.split(",")
    present = metric_names(runs)
    return [name for name in dict.fromkeys([*names, also]) if name in present]


# ------------------------------------------------------------------------------------------------------ order

BEST = "best"                                           # --sort by the main metric of each table


def check_sort(runs, column):
    """Raises UserError for a --sort that is neither a field nor a metric nor a column."""
    known = [BEST, *known_fields(runs), *metric_names(runs), *RESOURCES]
    if column is not None and column not in known:
        raise UserError(f"--sort {column} is no column of these runs{did_you_mean(column, known)}")


def ordered(groups, fields, column, metrics):
    """The groups in the order of --sort: a metric best first, a date latest first, all else upwards.

    Rows without a value come last; None leaves the order as it is.
    """
    if column == BEST:
        column = metrics[0] if metrics else None
    if column is None:
        return groups
    keys = {key: sort_value(key, runs, fields, column, metrics) for key, runs in groups.items()}
    return dict(sorted(groups.items(), key=lambda item: keys[item[0]]))


def sort_value(key, runs, fields, column, metrics):
    """What a group is sorted by: small ones first."""
    if column in fields:
        value = sort_key(key[fields.index(column)])
        return (value == sort_key(None), value)
    if column == "folder":
        return (False, folder_pattern(runs))
    if column == "date":
        return (False, -max(run["finished"] for run in runs))
    number = resource_of(column, runs) if column in RESOURCES else estimate(runs, column)[0]
    if number is None or math.isnan(number):
        return (True, 0.0)
    return (False, -number if column in metrics and not lower_is_better(column) else number)


def folder_pattern(runs):
    """The folder of a run, or a pattern for the folders of several."""
    folders = [str(run["folder"]) for run in runs]
    common = os.path.commonprefix(folders)
    return folders[0] if len(folders) == 1 else common + "*"


# ---------------------------------------------------------------------------------------------- rows of cells

def best(groups, metric):
    """The keys of the best groups, at most one: its interval overlaps no other.

    There is none where a group has no interval, or where the groups do not measure the same (`estimate`).
    """
    rivals = [(key, estimate(runs, metric)) for key, runs in groups.items() if metric_values(runs, metric)]
    if len(rivals) < 2 or measured_differently(sum(groups.values(), []), metric):
        return set()
    if not all(math.isfinite(low) for _, (_, _, low, _) in rivals):
        return set()
    if lower_is_better(metric):
        first, *others = sorted(rivals, key=lambda rival: rival[1][0])
        wins = all(first[1][3] < low for _, (_, _, low, _) in others)
    else:
        first, *others = sorted(rivals, key=lambda rival: -rival[1][0])
        wins = all(first[1][2] > high for _, (_, _, _, high) in others)
    return {first[0]} if wins else set()


def table(groups, fields, metrics, sort=None):
    """The Columns of a table.

    With --sort, or grouped by it, the folders of the rows are its last column.
    """
    columns = [Column(name, display_values([key[i] for key in groups]))
               for i, name in enumerate(fields) if name != "folder"]
    columns.append(Column("runs", [str(len(runs)) for runs in groups.values()]))
    for metric in metrics:
        columns += metric_columns(groups, metric, metric == metrics[0])
    columns += resource_columns(groups.values(), without=fields)
    if sort == "date" and "date" not in fields:
        latest = [max(runs, key=lambda run: run["finished"]) for runs in groups.values()]
        columns.append(Column("date", [field_value(run, "date") for run in latest]))
    if sort or "folder" in fields:
        columns.append(Column("folder", [folder_pattern(runs) for runs in groups.values()]))
    return columns


def metric_columns(groups, metric, main):
    """The column of a metric, and that of its 95 % intervals if there is one."""
    winners = best(groups, metric)
    means = []
    intervals = []
    for key, runs in groups.items():
        mean, interval = estimate_cells(runs, metric)
        means.append(mean)
        intervals.append(interval)
    winning = tuple(row for row, key in enumerate(groups) if key in winners)
    columns = [Column(metric, means, 0 if main else 2, winning)]
    if any(interval != MISSING for interval in intervals):
        columns.append(Column("95 %", intervals, 1 if main else 3))
    return columns


def estimate_cells(runs, metric):
    """(mean ± sd, 95 % interval) of a metric over runs, as cells; metric None: of nothing."""
    if not metric or not metric_values(runs, metric):
        return MISSING, MISSING
    mean, interval = format_estimate(estimate(runs, metric))
    return "mixed" if measured_differently(runs, metric) else mean, interval


def matrix(groups, fields, across, metrics=None):
    """Columns of cells "mean ± sd": one for each value of `across`, rows for those of the other fields.

    A cell shows the first of `metrics` that its runs have; None: the main metric of its runs.
    """
    i = fields.index(across)
    lines = {}
    for key, runs in groups.items():
        cell, _ = estimate_cells(runs, metric_of_cell(runs, metrics))
        lines.setdefault((*key[:i], *key[i + 1:]), {})[key[i]] = cell
    others = [name for name in fields if name != across]
    columns = [Column(name, display_values([key[j] for key in lines])) for j, name in enumerate(others)]
    values = sorted({key[i] for key in groups}, key=sort_key)
    for value, title in zip(values, display_values(values)):
        columns.append(Column(title, [cells.get(value, MISSING) for cells in lines.values()]))
    return columns


def metric_of_cell(runs, metrics=None):
    """The name of the metric that a cell of a matrix shows, or None."""
    candidates = metrics or [main_metric(runs[0])]
    return next((name for name in candidates if name and metric_values(runs, name)), None)


# --------------------------------------------------------------------------------------------------- printing

def print_tables(runs, cfg):
    """A table for each test set, and below them what the numbers are."""
    tests = by_test_set(runs)
    starred = False
    has_intervals = False
    dropped = {}
    for name, some in tests.items():
        if len(tests) > 1:
            print_result(f"{name}:" + "\n" * cfg.markdown)
        columns = print_table(some, cfg)
        starred |= any(column.best for column in columns)
        has_intervals |= any(column.title == "95 %" for column in columns)
        if not cfg.markdown:
            dropped.update((column.title, 1) for column in left_out_columns(columns, terminal_width()))
        print_result()
    print_left_out_columns(dropped)
    legend = "mean ± sd over the runs of a row"
    if has_intervals:
        legend += (". 95 %: Student's t over seeds; of a single run over test items (proportions: Wilson, "
                   "pass@k and rewards: Student's t)")
    if starred:
        legend += f"; {'bold' if cfg.markdown else '*'}: the best of its table: its interval overlaps no other"
    print_wrapped(f"{legend}." if len(tests) > 1 else f"{name}; {legend}.")


def print_table(runs, cfg):
    """Print the table of runs of one test set, and notes on it. Returns its Columns."""
    fields = group_fields(runs, cfg.by and [name for name in cfg.by.split(",") if name in known_fields(runs)])
    if cfg.sort in settings_of(runs) and cfg.sort not in fields:
        fields.append(cfg.sort)
    metrics = shown_metrics(runs, cfg.metric, cfg.sort)
    groups = ordered(group(runs, fields), fields, cfg.sort, metrics)
    columns = table(groups, fields, metrics, cfg.sort)
    print_columns(columns, cfg.markdown)
    sentences = []
    for metric in metrics:
        names = measured_differently(runs, metric)
        if names:
            mark = "nothing is bold" if cfg.markdown else "no *"
            sentences.append(f"{metric}: not the same in all rows, because {', '.join(names)} differs; {mark} "
                             "there.")
        sentences += fewer_runs(groups, fields, metric)
    sentences += averaged_fields(runs, groups, fields)
    if sentences and cfg.markdown:
        print_result()                                  # else the first one would be a row of the table
    for sentence in sentences:
        print_wrapped(sentence)
    return columns


def print_matrix(runs, fields, cfg):
    groups = group(runs, fields)
    metrics = cfg.metric and cfg.metric.split(",")
    print_columns(matrix(groups, fields, cfg.across, metrics), cfg.markdown)
    print_result()
    names = dict.fromkeys(filter(None, (metric_of_cell(some, metrics) for some in groups.values())))
    tests = by_test_set(runs)
    where = f"{next(iter(tests))}; " if len(tests) == 1 else ""
    each = ", the first of these that a cell's runs have" if metrics and len(names) > 1 else ""
    print_wrapped(f"{where}{', '.join(names)}{each}: mean ± sd over the runs of a cell.")
    for sentence in averaged_fields(runs, groups, fields):
        print_wrapped(sentence)


def fewer_runs(groups, fields, metric):
    """A sentence where the mean of a row is over fewer runs than the row has."""
    fewer = []
    for key, some in groups.items():
        having = len(metric_values(some, metric))
        if 0 < having < len(some):
            fewer.append(f"{having} of {len(some)} {group_label(key, fields)}")
    if not fewer:
        return []
    return [f"Not all runs of a row have {metric}; its mean is over those that do: {'; '.join(fewer)}."]


def averaged_fields(runs, groups, fields):
    """A sentence that names the flags, other than the seed, in which the runs of a row differ."""
    mixed = mixed_fields(runs, groups)
    if not mixed:
        return []
    finer = ",".join([*fields, mixed[0]])
    return [f"Rows average over {', '.join(mixed)}; --by {finer} splits them."]


def print_kept(runs):
    """Name the runs whose result --keep accepted after a change of code, with what had changed."""
    for run in runs:
        if run["result"].get("kept"):
            print_wrapped(f"{run['folder']} is from before a change of code, accepted by --keep: "
                          f"{', '.join(run['result']['kept'])}")


def print_left_out(left_out):
    print_result(f"\nNot in the table, {len(left_out)}:")
    for path, reason in left_out:
        print_wrapped(f"{path}  {reason}", "  ")
