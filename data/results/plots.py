"""data/results/plots.py: a plot of many runs, `--task table --plot FILE`; readable in grey, one column wide.

The axis (--x) decides what is drawn:

step        training loss, from ten logged steps on smoothed over a tenth of them, beside it the loss on
            valid where it is the same mean; and the metric on valid (filled) and on test (hollow), against
            optimiser steps, of RL iterations. A line is the mean over seeds, the band their range
a number    the metric against a flag that was swept, with the 95 % intervals of data/results/runs.py; the
            axis is logarithmic where the values grow by factors. A group without the flag is a level line.
            With --select the mean as a line, a dot for each seed, and a ring around the chosen value
a word      the metric of each group as a dot with its interval
ranks       AdaLoRA: the rank that each module kept, layers across
k           pass@k against k, with 95 % bands: runs of --task eval or sample with --num_generations
a logged field, as tokens, seconds or kl, and every axis with --y
            the fields of --y, as kl,kl_k2, as log.jsonl has them in training
sqrt_kl     PPO: gold reward and reward model's score against the root of the KL divergence from the reference
            (Gao et al. 2022, arXiv 2210.10760, figure 1). Overoptimisation is where the gold reward falls
            while the score rises

Groups differ in brightness, dashes and markers at once. A title says on how many runs, and a metric's on how
many test items, a point stands. matplotlib is imported when a plot is drawn.

Runs of different data or test items never share a line or a mean: they have lines of their own.

Public: draw, choose_axis, separating_fields, grows_by_factors, SPECIAL_AXES
"""
import math
import pathlib
import warnings

from data.results.log_plots import (WIDTH, add_legend, draw_logged, draw_overoptimisation, draw_ranks,
                                    draw_steps, group_label, label_lines, logged_fields, rlhf_events, runs_of,
                                    span_of, style_of)
from data.results.runs import (display_value, estimate, events, field_value, group, is_proportion,
                               metric_values, test_set)
from data.runtime.files import UserError

SPECIAL_AXES = ("step", "ranks", "sqrt_kl", "k")        # what --x takes besides a field
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
         "lines.linewidth": 1.3, "lines.markersize": 4, "legend.frameon": False, "axes.titlesize": 8,
         "axes.grid": True, "grid.linewidth": 0.4, "grid.color": "0.88", "axes.axisbelow": True,
         "svg.hashsalt": "plaintune"}                   # the same runs make the same file, to the byte
UNDATED = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}


def draw(path, groups, fields, metric, x=None, y=None, chosen=None):
    """Write one plot of {values of `fields`: runs} to a .svg, .png or .pdf file. Raises UserError.

    x, y: of --x and --y; y is a string of logged fields, "kl,length".
    chosen: {values of `fields` without x: the value of x that --select chose}
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    ending = pathlib.Path(path).suffix
    if ending not in UNDATED:
        raise UserError(f"--plot {path}: the name must end in .svg, .png or .pdf")
    x = x or ("step" if y else choose_axis(groups, fields))
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained", dpi=200)
        draw_axis(figure, groups, fields, metric, x, y, chosen or {})
        try:
            with warnings.catch_warnings():             # too many labels for the layout: they overlap
                warnings.simplefilter("ignore", UserWarning)
                figure.savefig(path, metadata=UNDATED[ending])
        except OSError as e:
            raise UserError(f"--plot {path} cannot be written ({e.strerror})") from e


def draw_axis(figure, groups, fields, metric, x, y=None, chosen={}):
    """Call the function that draws the axis x."""
    if x == "k" and not y:
        draw_pass_at_k(figure, groups, fields)
    elif x in fields and not y:
        values = [key[fields.index(x)] for key in groups]
        if all(value is None or is_number(value) for value in values):
            draw_sweep(figure, groups, fields, metric, x, chosen)
        else:
            draw_dots(figure, groups, fields, metric)
    else:
        draw_logs(figure, groups, fields, metric, x, y)


def draw_logs(figure, groups, fields, metric, x, y):
    """The same for what runs logged."""
    logs = {key: [events(run["folder"]) for run in runs] for key, runs in groups.items()}
    known = logged_fields([log for some in logs.values() for log in some])
    if y or x in known and x not in SPECIAL_AXES:
        draw_logged(figure, logs, fields, x, y.split(",") if y else [default_y(known, metric)])
    elif x == "step":
        draw_steps(figure, logs, fields, metric, items_of(groups))
    elif x == "ranks":
        draw_ranks(figure, logs, fields)
    elif x == "sqrt_kl":
        draw_overoptimisation(figure, logs, fields)
    else:
        raise UserError(f"--x {x}: the runs are grouped by {', '.join(fields)}; name it in --by, too")


def default_y(known, metric):
    """What is drawn against a logged field without --y: the metric, if logged, else the score or the loss."""
    return next((name for name in (metric, "score", "loss") if name in known), metric)


def choose_axis(groups, fields):
    """The default of --x: sqrt_kl for PPO runs, a swept number, ranks for AdaLoRA, otherwise step."""
    runs = [run for some in groups.values() for run in some]
    if runs and all(rlhf_events(events(run["folder"])) for run in runs):
        return "sqrt_kl"
    for i, name in enumerate(fields):
        if len({key[i] for key in groups if is_number(key[i])}) > 1:
            return name
    if runs and all(any("ranks" in event for event in events(run["folder"])) for run in runs):
        return "ranks"
    return "step"


def separating_fields(runs, fields, x):
    """`fields`, and "data" and "test" where a line or a mean would join runs that differ in these."""
    fields = list(fields)
    for name in ("data", "test"):
        one_line = group(runs, [field for field in fields if field != x]).values()
        if name not in fields and any(len({field_value(run, name) for run in some}) > 1 for some in one_line):
            fields.append(name)
    return fields


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def grows_by_factors(values):
    """Whether sorted values grow by similar factors rather than by similar steps."""
    if len(values) < 3 or min(values) <= 0:
        return False
    steps = [b - a for a, b in zip(values, values[1:])]
    factors = [math.log(b / a) for a, b in zip(values, values[1:])]
    return max(factors) / min(factors) < max(steps) / min(steps)


# ---------------------------------------------------------------------------------------------- swept fields

def metric_label(groups, metric):
    label = metric.replace("_", " ")
    has_interval = any(math.isfinite(estimate(runs, metric)[2]) for runs in groups.values())
    return f"{label} (95 % intervals)" if has_interval else label


def items_of(groups):
    """On how many test items the runs were measured, as "300 test items"; "" where it is not known."""
    every = [run for runs in groups.values() for run in runs]
    counts = sorted({test_set(run)[0] or 0 for run in every})
    units = dict.fromkeys(run.get("test_unit", "items") for run in every)
    return f"{span_of(counts)} test {' and '.join(units)}" if counts and counts[0] else ""


def title_of(groups):
    """On how many runs and test items a point stands."""
    return "a point: " + ", ".join(filter(None, [runs_of(groups.values()), items_of(groups)]))


def error_bar(numbers):
    """(mean, sd, low, high) -> the arms of the interval as matplotlib's errorbar takes them, or None."""
    mean, _, low, high = numbers
    return [[mean - low], [high - mean]] if math.isfinite(low) else None


def limits(low, high, metric):
    """The limits of an axis: those of the data, but a proportion stays within 0 and 1."""
    return (max(0, low), min(1, high)) if is_proportion(metric) else (low, high)


def draw_sweep(figure, groups, fields, metric, x, chosen={}):
    """The metric against the numbers of the field x, a line for each value of the other fields.

    chosen: {values of the other fields: the value of x to mark}; then dots are seeds, in place of intervals.
    """
    figure.set_size_inches(WIDTH, 2.8)
    axis = figure.subplots()
    i = fields.index(x)
    values = sorted({key[i] for key in groups if key[i] is not None})
    lines = {}
    for key, runs in groups.items():
        lines.setdefault((*key[:i], *key[i + 1:]), {})[key[i]] = runs
    others = [name for name in fields if name != x]
    handles = []
    for number, (key, points) in enumerate(lines.items()):
        style = style_of(number, len(lines))
        if None in points:
            handles.append(draw_level(axis, estimate(points.pop(None), metric), style))
            handles[-1].set_label(group_label(key, others))
        if points:
            if chosen:
                handles.append(draw_seeds(axis, points, metric, chosen.get(key), style))
            else:
                step = min(0.015, 0.05 / max(1, len(lines) - 1))    # side by side: no interval hides another,
                shift = step * (number - (len(lines) - 1) / 2)      # and none stands at its neighbour's value
                estimates = {value: estimate(runs, metric) for value, runs in points.items()}
                handles.append(draw_line(axis, estimates, values, shift, style))
            handles[-1].set_label(group_label(key, others))
    if grows_by_factors(values):
        axis.set_xscale("log")
    set_ticks(axis, values)
    axis.set_xlabel(x)
    axis.set_ylabel(metric.replace("_", " ") if chosen else metric_label(groups, metric))
    axis.set_ylim(*limits(*axis.get_ylim(), metric))
    ring = f"\nsmall: one seed; ring: the chosen {x}" if chosen else ""
    axis.set_title(title_of(groups) + ring, loc="left")
    if len(handles) > 1 and not label_lines(figure, axis, handles):
        add_legend(figure, handles, [handle.get_label() for handle in handles])


def draw_level(axis, numbers, style):
    """A group without the swept field: its mean as a horizontal line, its interval as a band."""
    mean, _, low, high = numbers
    if math.isfinite(low):
        axis.axhspan(low, high, color=style["color"], alpha=0.12, linewidth=0)
    return axis.axhline(mean, **{**style, "marker": ""})


def set_ticks(axis, values):
    """A tick at each value; of more than six, where the axis is logarithmic, at each power of ten."""
    if axis.get_xscale() == "log" and len(values) > 6:
        powers = range(math.ceil(math.log10(values[0]) - 1e-9), math.floor(math.log10(values[-1]) + 1e-9) + 1)
        if len(powers) > 1:
            values = [10.0 ** power for power in powers]
    axis.set_xticks(values, [display_value(value) for value in values])
    axis.set_xticks([], minor=True)


def draw_seeds(axis, points, metric, chosen, style):
    """points: {value: runs}. The means as a line, each run as a dot, a ring at `chosen`. Returns the line."""
    means = {value: estimate(runs, metric)[0] for value, runs in points.items()}
    for value, runs in points.items():
        numbers = metric_values(runs, metric)
        axis.plot([value] * len(numbers), numbers, **{**style, "linestyle": "", "alpha": 0.5}, markersize=3,
                  markeredgewidth=0)
    if chosen in means:
        axis.plot(chosen, means[chosen], marker="o", markersize=9, markerfacecolor="none", markeredgewidth=1.1,
                  color="black", zorder=3)
    return axis.plot(list(means), list(means.values()), **style)[0]


def draw_line(axis, points, values, shift, style):
    """points: {value: estimate}; `shift` moves them sideways by a share of the axis. Returns the line."""
    positions = []
    for value, numbers in points.items():
        if grows_by_factors(values):
            position = value * (values[-1] / values[0]) ** shift
        else:
            position = value + (values[-1] - values[0]) * shift
        axis.errorbar(position, numbers[0], yerr=error_bar(numbers), capsize=2.5, elinewidth=0.9,
                      **{**style, "linestyle": ""})
        positions.append(position)
    return axis.plot(positions, [numbers[0] for numbers in points.values()], **style)[0]


def draw_pass_at_k(figure, groups, fields):
    """pass@k against k: the mean over the runs of a group, and its 95 % interval as a band."""
    figure.set_size_inches(WIDTH, 2.8)
    axis = figure.subplots()
    curves = {key: pass_curve_of(runs) for key, runs in groups.items()}
    curves = {key: curve for key, curve in curves.items() if curve}
    if not curves:
        raise UserError("--x k: no run has pass@k; it comes with --task eval or sample and --num_generations")
    handles = []
    for i, curve in enumerate(curves.values()):
        style = {**style_of(i, len(curves)), "marker": ""}
        ks = list(curve)
        means, _, lows, highs = zip(*curve.values())
        axis.fill_between(ks, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
        handles.append(axis.plot(ks, means, **style)[0])
    most = max(map(max, curves.values()))
    axis.set_xscale("log", base=2)
    ticks = [2 ** i for i in range(most.bit_length()) if 2 ** i <= most]
    axis.set_xticks(ticks, map(str, ticks))
    axis.set_xticks([], minor=True)
    axis.set_xlabel("k")
    axis.set_ylabel("pass@k (95 % bands)")
    axis.set_title(title_of({key: groups[key] for key in curves}), loc="left")
    add_legend(figure, handles, [group_label(key, fields) for key in curves])


def pass_curve_of(runs):
    """{k: estimate of pass@k}, for the k that all runs of a group have."""
    names = [{name for name in run["result"].get("metrics", {}) if name.startswith("pass@")} for run in runs]
    ks = sorted(int(name.removeprefix("pass@")) for name in set.intersection(*names))
    return {k: estimate(runs, f"pass@{k}") for k in ks}


def draw_dots(figure, groups, fields, metric):
    figure.set_size_inches(WIDTH, 0.9 + 0.24 * len(groups))
    axis = figure.subplots()
    for i, runs in enumerate(groups.values()):
        numbers = estimate(runs, metric)
        axis.errorbar(numbers[0], i, xerr=error_bar(numbers), color="black", marker="o", capsize=2.5,
                      elinewidth=0.9)
    axis.set_yticks(range(len(groups)), [group_label(key, fields) for key in groups])
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlabel(metric_label(groups, metric))
    axis.set_title(title_of(groups), loc="left")
    axis.set_xlim(*limits(*axis.get_xlim(), metric))
