"""data/results/plots.py: one picture of many runs, chosen by what they hold. It must read in grey and at half a page.

    step        training loss, smoothed over a tenth of what was logged, and the metric on valid (filled) and
                test (hollow), against optimiser steps: lines are means over seeds, bands their range
    a number    the metric against a swept flag, with the 95 % intervals of data/results/tables.py; the axis is
                logarithmic where the values grow by factors. A group that does not read the flag is a level
    a word      the metric of each group as a dot with its interval
    ranks       AdaLoRA: how many triplets each module kept, layers across
    sqrt_kl     RLHF: the judge's reward and the reward model's score against the root of the KL divergence
                from the reference (Gao et al. 2022): where the first falls while the second rises, the
                policy pleases the reward model only

Groups differ in brightness, dashes and markers at once. matplotlib is imported when a picture is drawn.

Public: draw, choose, geometric
"""
import math
import pathlib
import re
import warnings

from data.runtime.files import UserError
from data.results.tables import PROPORTIONS, estimate, events, shown

DASHES, MARKS = ("-", "--", ":", "-."), "osD^vP"
WIDTH = 3.5                                             # inches: a column of a two-column page
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
         "lines.linewidth": 1.3, "lines.markersize": 4, "legend.frameon": False, "axes.titlesize": 8,
         "axes.grid": True, "grid.linewidth": 0.4, "grid.color": "0.88", "axes.axisbelow": True}


def draw(path, groups, by, metric, x=None):
    """One picture of {values of the fields `by`: runs}, written to a .svg, .png or .pdf file."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot draws with matplotlib; it is not here yet: pip install matplotlib") from None
    if pathlib.Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {path}: the name must end in .svg, .png or .pdf")
    x = x or choose(groups, by)
    logs = {key: [events(run["folder"]) for run in runs] for key, runs in groups.items()}
    with matplotlib.rc_context(STYLE):
        fig = Figure(layout="constrained", dpi=200)
        if x == "step":
            curves(fig, logs, by, metric)
        elif x == "ranks":
            heat(fig, logs, by)
        elif x == "sqrt_kl":
            overoptimisation(fig, logs, by)
        elif x not in by:
            raise UserError(f"--x {x}: the runs are grouped by {', '.join(by)}; name it in --by, too")
        elif all(number(key[by.index(x)]) or key[by.index(x)] is None for key in groups):
            against(fig, groups, by, metric, x)
        else:
            dots(fig, groups, by, metric)
        try:
            with warnings.catch_warnings():             # too many labels for its layout: they overlap then
                warnings.simplefilter("ignore", UserWarning)
                fig.savefig(path)
        except OSError as e:
            raise UserError(f"--plot {path} cannot be written ({e.strerror})") from e


def number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def choose(groups, by):
    """What the picture runs over, if nobody said: RLHF, a swept number, AdaLoRA's ranks, or else steps."""
    runs = [run for rs in groups.values() for run in rs]
    if runs and all(judged(events(run["folder"])) for run in runs):
        return "sqrt_kl"
    for i, name in enumerate(by):
        if len({key[i] for key in groups if number(key[i])}) > 1:
            return name
    return "ranks" if runs and all(r["config"].get("method") == "adalora" for r in runs) else "step"


def geometric(values):
    """Do the values grow by factors rather than by steps?"""
    if len(values) < 3 or min(values) <= 0:
        return False
    steps = [b - a for a, b in zip(values, values[1:])]
    factors = [math.log(b / a) for a, b in zip(values, values[1:])]
    return max(factors) / min(factors) < max(steps) / min(steps)


def words(key, by, without=None):
    """A group in words: methods and tasks by their names, flags with theirs."""
    return ", ".join(shown(v) if name in ("method", "task", "init", "data") else f"{name} {shown(v)}"
                     for name, v in zip(by, key) if v is not None and name != without) or "all"


def looks(i, n):
    """The i-th of n styles: from dark to light, no two alike in dash and marker next to each other."""
    from matplotlib import colormaps
    return dict(color=colormaps["viridis"](0.75 * i / max(n - 1, 1)), linestyle=DASHES[i % len(DASHES)],
                marker=MARKS[i % len(MARKS)])


def legend(fig, handles, labels):
    if len(labels) > 1:
        across = max(1, int(66 / (max(map(len, labels)) + 9)))
        fig.legend(handles, labels, loc="outside lower center", ncols=min(across, len(labels)),
                   handlelength=2.6, columnspacing=1.2)


def smooth(values, width):
    """The mean of the last `width` values (of fewer at the start)."""
    return [sum(values[max(0, i + 1 - width):i + 1]) / min(i + 1, width) for i in range(len(values))]


def over_seeds(logs, kind, name, wide=False):
    """(steps, means, lows, highs) of one number in the events of one kind; steps that every run has."""
    found = [{e["step"]: float(e[name]) for e in log if e["event"] == kind and name in e} for log in logs]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    columns = list(zip(*(smooth([f[s] for s in steps], 1 + len(steps) // 10 * wide) for f in found)))
    return steps, [sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def curves(fig, logs, by, metric):
    seen = [e for ls in logs.values() for log in ls for e in log]
    told = any(e["event"] == "valid" and metric in e for e in seen)
    main = next((n for n in ("loss", "score") if any(e["event"] == "train" and n in e for e in seen)), None)
    if main is None:
        raise UserError("--x step: these runs logged no steps of training; name a field instead of step")
    fig.set_size_inches(WIDTH, 4.2 if told else 2.5)
    axes, handles = fig.subplots(1 + told, 1, sharex=True, squeeze=False)[:, 0], []
    for i, (key, ls) in enumerate(logs.items()):
        style = looks(i, len(logs))
        plain = {**style, "marker": ""}
        steps, mean, low, high = over_seeds(ls, "train", main, wide=True)
        handles.append(axes[0].plot(steps, mean, **plain)[0])
        axes[0].fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
        if told:
            steps, mean, low, high = over_seeds(ls, "valid", metric)
            handles[-1] = axes[1].plot(steps, mean, **style)[0]
            axes[1].fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
            for kind in ("baseline", "test"):
                steps, mean, *_ = over_seeds(ls, kind, metric)
                axes[1].plot(steps, mean, **{**style, "linestyle": ""}, markerfacecolor="white")
    most = max(len(ls) for ls in logs.values())
    axes[0].set_title("smoothed" + f", mean and range over {most} runs" * (most > 1), loc="left")
    axes[0].set_ylabel("training loss (nats)" if main == "loss" else "score in training")
    if told:
        axes[1].set_title("filled: valid, hollow: test", loc="left")
        axes[1].set_ylabel(metric.replace("_", " "))
    axes[-1].set_xlabel("optimiser step")
    legend(fig, handles, [words(key, by) for key in logs])


def axis(groups, metric):
    known = any(math.isfinite(estimate(runs, metric)[2]) for runs in groups.values())
    return metric.replace("_", " ") + " (95 % intervals)" * known


def spread(found):
    """The two arms of a 95 % interval, as errorbar wants them; None if there is none."""
    mean, _, low, high = found
    return [[mean - low], [high - mean]] if math.isfinite(low) else None


def against(fig, groups, by, metric, x):
    fig.set_size_inches(WIDTH, 2.8)
    ax, at = fig.subplots(), by.index(x)
    values, lines = sorted({key[at] for key in groups if key[at] is not None}), {}
    for key, runs in groups.items():
        lines.setdefault(key[:at] + (None,) + key[at + 1:], {})[key[at]] = estimate(runs, metric)
    log, handles = geometric(values), []
    for i, points in enumerate(lines.values()):
        style = looks(i, len(lines))
        if None in points:                              # it does not read this flag: the same at every value
            handles.append(ax.axhline(points[None][0], **{**style, "marker": ""}))
            if math.isfinite(points[None][2]):
                ax.axhspan(*points[None][2:], color=style["color"], alpha=0.12, linewidth=0)
        points = {v: e for v, e in points.items() if v is not None}
        shift = 0.015 * (i - (len(lines) - 1) / 2)      # side by side, so that no interval hides another
        at_x = {v: v * (values[-1] / values[0]) ** shift if log else v + (values[-1] - values[0]) * shift
                for v in points}
        for v, found in points.items():
            ax.errorbar(at_x[v], found[0], yerr=spread(found), capsize=2.5, elinewidth=0.9,
                        **{**style, "linestyle": ""})
        if points:
            handles += ax.plot(list(at_x.values()), [e[0] for e in points.values()], **style)
    if log:
        ax.set_xscale("log")
    ax.set_xticks(values, [shown(v) for v in values])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(x)
    ax.set_ylabel(axis(groups, metric))
    if metric in PROPORTIONS:                           # Student's interval knows no bounds, a share does
        ax.set_ylim(max(0, ax.get_ylim()[0]), min(1, ax.get_ylim()[1]))
    legend(fig, handles, [words(key, by, x) for key in lines])


def dots(fig, groups, by, metric):
    fig.set_size_inches(WIDTH, 0.7 + 0.24 * len(groups))
    ax = fig.subplots()
    for i, runs in enumerate(groups.values()):
        found = estimate(runs, metric)
        ax.errorbar(found[0], i, xerr=spread(found), color="black", marker="o", capsize=2.5, elinewidth=0.9)
    ax.set_yticks(range(len(groups)), [words(key, by) for key in groups])
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_xlabel(axis(groups, metric))
    if metric in PROPORTIONS:
        ax.set_xlim(max(0, ax.get_xlim()[0]), min(1, ax.get_xlim()[1]))


def heat(fig, logs, by):
    kept = {}
    for key, ls in logs.items():
        ranks = [next((e["ranks"] for e in reversed(log) if "ranks" in e), None) for log in ls]
        if ranks and all(ranks):
            kept[key] = {path: sum(r[path] for r in ranks) / len(ranks) for path in ranks[0]}
    if not kept:
        raise UserError("--x ranks: no run logged AdaLoRA's ranks; they come with --method adalora")
    places = {path: re.fullmatch(r".*?(\d+)\.(?:.*\.)?(\w+)", path) for r in kept.values() for path in r}
    layers = sorted({int(m[1]) for m in places.values() if m})
    kinds = list(dict.fromkeys(m[2] for m in places.values() if m))
    wide, high = 0.9 + 0.26 * len(layers), 0.6 + 0.26 * len(kinds)
    fig.set_size_inches(max(2.2, min(7, wide)), high * len(kept) + 0.3)
    top = max(v for r in kept.values() for v in r.values())
    for ax, (key, ranks) in zip(fig.subplots(len(kept), 1, squeeze=False)[:, 0], kept.items()):
        cells = [[math.nan] * len(layers) for _ in kinds]
        for path, m in places.items():
            if m and path in ranks:
                i, j = kinds.index(m[2]), layers.index(int(m[1]))
                cells[i][j] = ranks[path]
                ax.text(j, i, f"{ranks[path]:.3g}", ha="center", va="center", fontsize=7,
                        color="white" if ranks[path] > top / 2 else "black")
        ax.imshow(cells, cmap="Greys", vmin=0, vmax=1.25 * top, aspect="auto")
        ax.set_xticks(range(len(layers)), layers)
        ax.set_yticks(range(len(kinds)), kinds)
        ax.grid(False)
        ax.set_title("triplets kept" + f", {words(key, by)}" * (len(kept) > 1), loc="left")
    ax.set_xlabel("layer")


def judged(log):
    return [e for e in log if e["event"] == "train" and {"gold", "score", "sqrt_kl"} <= e.keys()]


def overoptimisation(fig, logs, by):
    paths = {key: [path for log in ls if (path := judged(log))] for key, ls in logs.items()}
    paths, handles = {key: found for key, found in paths.items() if found}, []
    if not paths:
        raise UserError("--x sqrt_kl: no run logged gold and sqrt_kl; these come with --task ppo")
    fig.set_size_inches(WIDTH, 4)
    top, bottom = fig.subplots(2, 1, sharex=True)
    for i, found in enumerate(paths.values()):
        style = {**looks(i, len(paths)), "marker": ""}
        for path in found:
            x, gold, score = (smooth([float(e[name]) for e in path], 1 + len(path) // 10)
                              for name in ("sqrt_kl", "gold", "score"))
            line, = top.plot(x, gold, **style)
            bottom.plot(x, score, **style)
            peak = max(range(len(gold)), key=gold.__getitem__)
            top.plot(x[peak], gold[peak], marker="o", color=style["color"], markerfacecolor="white", zorder=3)
        handles.append(line)
    top.set_title("smoothed; ring: the most that the judge gave", loc="left")
    top.set_ylabel("judge's reward")
    bottom.set_ylabel("reward model's score")
    bottom.set_xlabel("√KL(policy ‖ reference), √nats")
    legend(fig, handles, [words(key, by) for key in paths])
