"""data/results/tables.py: --task table. Many run folders in one table; optionally a comparison and a plot.

A row is a group of runs (data/results/runs.py) and shows, for each metric, mean ± sd and its 95 % interval.

*           the best group among those on the same data: all of these have an interval, and that of the best
            overlaps no other (bold in Markdown)
--across    a matrix: the values of one field are the columns, and a cell is one number
left out    a folder that looks like a run and is not in the table is listed below it with the reason

Public: TableFlags, show, best, table, matrix, format_size
"""
import difflib
import math
import shutil
import textwrap
from dataclasses import dataclass

from data.results import plots
from data.results.compare import compare
from data.results.metrics import summary
from data.results.runs import (LOWER_IS_BETTER, MISSING, display_value, estimate, field_value, gather, group,
                               group_fields, known_fields, main_metric, metric_values, sort_key)
from data.runtime.files import UserError
from data.runtime.flags import flag
from data.runtime.run_folder import print_result


@dataclass(frozen=True)
class TableFlags:
    "table"
    runs: list = flag(("out/*",), "run folders, or patterns for them", type=str, nargs="+")
    by: str = flag(None, "fields to group by, as method,rank; default: those in which runs differ", type=str)
    across: str = flag(None, "a matrix: a column for each value of this field, and one number a cell, the "
                       "first of --metric that its runs have", type=str)
    metric: str = flag(None, "what to show, as exact_match,loss; default: the metric of each task", type=str)
    compare: list = flag(None, "paired difference of two groups: lora full, or rank=1 rank=8, or "
                         "method=lora,rank=1 full", type=str, nargs=2)
    markdown: bool = flag(False, "the table in Markdown")
    plot: str = flag(None, "draw a plot into this .svg, .png or .pdf file", type=str)
    x: str = flag(None, "the plot's axis: step, ranks, sqrt_kl or a field; default: what fits", type=str)


def show(cfg):
    """The command: prints the table of cfg.runs and returns the exit code 0. Raises UserError."""
    runs, left_out = gather(cfg.runs)
    if not runs and not left_out:
        raise UserError(f"--runs {' '.join(cfg.runs)}: no run folder is there; runs are written into "
                        "out/, or where --out points")
    fields = group_fields(runs, cfg.by and cfg.by.split(","))
    if cfg.across and cfg.across not in fields:
        fields.append(cfg.across)
    if runs:
        check_fields(runs, fields if cfg.x in (None, *plots.SPECIAL_AXES) else [*fields, cfg.x])
    metrics = shown_metrics(runs, cfg.metric)
    if (cfg.compare or cfg.plot) and not metrics:
        raise UserError("no finished run has a metric, so there is nothing to compare or to plot")
    groups = group(runs, fields)
    if runs:
        if cfg.across:
            rows = matrix(groups, fields, cfg.across, metrics if cfg.metric else None)
        else:
            rows = table(groups, fields, metrics)
        print_table(rows, cfg.markdown)
        print_mixed_fields(runs, groups, fields)
        print_kept(runs)
    if cfg.compare:
        print_result("\n" + "\n".join(compare(runs, *cfg.compare, fields, metrics[0])))
    if left_out:
        print_left_out(left_out)
    if cfg.plot:
        plots.draw(cfg.plot, groups, fields, metrics[0], cfg.x)
        print_result(f"\n{cfg.plot}")
    return 0


def check_fields(runs, fields):
    """Raises UserError for a field that no run has."""
    known = known_fields(runs)
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{name} is no field of these runs{hint}")


def shown_metrics(runs, requested):
    """The metrics to show: those of --metric, or the main metric of each run and "forgetting".

    Raises UserError for a requested one that no run has.
    """
    present = {name for run in runs for name in run["result"].get("metrics", {})}
    if not requested:
        names = dict.fromkeys([main_metric(run) for run in runs] + ["forgetting"])
        return [name for name in names if name in present]
    for name in requested.split(","):
        if runs and name not in present:
            raise UserError(f"--metric {name}: no run has it; there is {' '.join(sorted(present))}")
    return [name for name in requested.split(",") if name in present]


# ---------------------------------------------------------------------------------------------- rows of cells

def best(groups, metric):
    """The keys of the best groups, at most one for each data set: its interval overlaps no other there.

    There is none on a data set where a group has no interval.
    """
    by_data = {}
    for key, runs in groups.items():
        if metric_values(runs, metric):
            data = frozenset(run.get("data_sha256") for run in runs)
            by_data.setdefault(data, []).append((key, estimate(runs, metric)))
    winners = set()
    for rivals in by_data.values():
        if len(rivals) < 2 or not all(math.isfinite(low) for _, (_, _, low, _) in rivals):
            continue
        if metric in LOWER_IS_BETTER:
            first, *others = sorted(rivals, key=lambda rival: rival[1][0])
            wins = all(first[1][3] < low for _, (_, _, low, _) in others)
        else:
            first, *others = sorted(rivals, key=lambda rival: -rival[1][0])
            wins = all(first[1][2] > high for _, (_, _, _, high) in others)
        if wins:
            winners.add(first[0])
    return winners


def format_estimate(numbers):
    """(mean, sd, low, high) -> "mean ± sd" and "[low, high]", with the same decimals."""
    mean, sd, low, high = numbers
    if abs(mean) >= 100:
        decimals = 1
    elif 0 < abs(mean) < 0.1:
        decimals = 5
    else:
        decimals = 3
    text = f"{mean:.{decimals}f}"
    if math.isfinite(sd):
        text += f" ± {sd:.{decimals}f}"
    return text, f"[{low:.{decimals}f}, {high:.{decimals}f}]" if math.isfinite(low) else MISSING


def format_size(n):
    """Bytes -> "3.7 MB"; two digits at least from 1 kB on."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5 or unit == "GB":
            decimals = 1 if n < 10 and unit != "B" else 0
            return f"{n:.{decimals}f} {unit}"
        n /= 1000


# (title of the column, key in result.json, function that formats it)
RESOURCES = (("trainable", "params_trainable", "{:,.0f}".format),
             ("stored", "adapter_bytes", format_size),
             ("memory", "peak_memory_mb", "{:.0f} MB".format),
             ("tokens/s", "tokens_per_second", "{:,.0f}".format))


def table(groups, fields, metrics):
    """Rows of cells, the head first; the mean of a group that is best ends in an asterisk."""
    winners = {metric: best(groups, metric) for metric in metrics}
    head = [*fields, "runs"]
    for metric in metrics:
        head += [metric, "95 %"]
    rows = [head + [title for title, _, _ in RESOURCES]]
    for key, runs in groups.items():
        row = [*map(display_value, key), str(len(runs))]
        for metric in metrics:
            if not metric_values(runs, metric):
                row += [MISSING, MISSING]
                continue
            mean, interval = format_estimate(estimate(runs, metric))
            row += [mean + "*" if key in winners[metric] else mean, interval]
        for _, name, text in RESOURCES:
            values = metric_values(runs, name)
            row.append(text(summary(values)[0]) if values else MISSING)
        rows.append(row)
    return without_empty_intervals(rows)


def without_empty_intervals(rows):
    head, *body = rows
    empty = {i for i, name in enumerate(head) if name == "95 %" and all(row[i] == MISSING for row in body)}
    return [[cell for i, cell in enumerate(row) if i not in empty] for row in rows]


def matrix(groups, fields, across, metrics=None):
    """Rows of cells "mean ± sd": a column for each value of `across`, rows for those of the other fields.

    A cell shows the first of `metrics` that its runs have; None: the main metric of its runs.
    """
    i = fields.index(across)
    lines = {}
    for key, runs in groups.items():
        candidates = metrics or [main_metric(runs[0])]
        name = next((name for name in candidates if metric_values(runs, name)), None)
        cell = format_estimate(estimate(runs, name))[0] if name else MISSING
        lines.setdefault((*key[:i], *key[i + 1:]), {})[key[i]] = cell
    columns = sorted({key[i] for key in groups}, key=sort_key)
    head = [name for name in fields if name != across] + [display_value(value) for value in columns]
    body = [[*map(display_value, key), *(cells.get(value, MISSING) for value in columns)]
            for key, cells in lines.items()]
    return [head, *body]


# --------------------------------------------------------------------------------------------------- printing

def print_table(rows, markdown):
    print_result("\n".join(markdown_lines(rows) if markdown else aligned_lines(rows)))
    legend = ("mean ± sd over the runs of a row. 95 %: Student's t over seeds; of a single run, Wilson over "
              "test items (proportions only)")
    if any(cell.endswith("*") for row in rows[1:] for cell in row):
        legend += "; * the best: its interval overlaps no other"
    print_result(f"\n{legend}.")


def markdown_lines(rows):
    bold = [[f"**{cell[:-1]}**" if cell.endswith("*") else cell for cell in row] for row in rows]
    rule = ["---"] * len(bold[0])
    return ["| " + " | ".join(row) + " |" for row in (bold[0], rule, *bold[1:])]


def aligned_lines(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return lines


def print_mixed_fields(runs, groups, fields):
    """Name the fields, other than the seed, in which the runs of a row differ."""
    mixed = []
    for name in known_fields(runs):
        values = [{display_value(field_value(run, name)) for run in some} for some in groups.values()]
        if name != "seed" and any(len(some) > 1 for some in values):
            mixed.append(name)
    if mixed:
        finer = ",".join([*fields, mixed[0]])
        print_result(f"Rows average over {', '.join(mixed)}; --by {finer} splits them.")


def print_kept(runs):
    """Name the runs whose result --keep accepted after a change of code, with what had changed."""
    for run in runs:
        if run["result"].get("kept"):
            print_result(f"{run['folder']} is from before a change of code, accepted by --keep: "
                         f"{', '.join(run['result']['kept'])}")


def print_left_out(left_out):
    width = shutil.get_terminal_size((200, 0)).columns - 2
    print_result(f"\nNot in the table, {len(left_out)}:")
    for path, reason in left_out:
        print_result("  " + textwrap.shorten(f"{path}  {reason}", width, placeholder=" ..."))
