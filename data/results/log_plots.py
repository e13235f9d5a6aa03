"""data/results/log_plots.py: plots of what runs logged in training: curves, ranks, gold reward against KL.

Each function draws into a matplotlib Figure. logs: {key of the group: [events of one run, ...]}; fields: the
names of the key's values. The styles and labels of all plots are here, too.

Public: draw_steps, draw_logged, logged_fields, draw_ranks, draw_overoptimisation, rlhf_events, group_label,
style_of, add_legend, label_lines, span_of
"""
import math
import re

from data.results.metrics import unit
from data.results.runs import did_you_mean, display_value
from data.runtime.files import UserError

NAMED_BY_VALUE = ("method", "task", "init", "data")     # fields whose value needs no name in a label
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP"
ROW_HEIGHT = 0.19                                       # inches of a row of a legend
WIDTH = 3.5                                             # inches: a column of a two-column page


# ------------------------------------------------------------------------------------------ labels and styles

def group_label(key, fields, without=None):
    """A group in words: a method or task by its value, any other field as "name value"; a switch by its name, and
    what is off not at all, unless nothing else tells the group."""
    parts = []
    for name, value in zip(fields, key):
        if value is None or name == without:
            continue
        if name in NAMED_BY_VALUE:
            parts.append(display_value(value))
        elif value is not False and value != "none":
            parts.append(name if value is True else f"{name} {display_value(value)}")
    off = [f"{name} {display_value(value)}" for name, value in zip(fields, key) if name != without]
    return ", ".join(parts or off) or "all"


def style_of(i, n):
    """The i-th of n styles, from dark to light; neighbours differ in dash and marker."""
    from matplotlib import colormaps
    return {"color": colormaps["viridis"](0.75 * i / max(n - 1, 1)), "linestyle": DASHES[i % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)]}


def add_legend(figure, handles, labels):
    """A legend below the plot, in as many columns as its labels leave room for. From the fourth row on the figure
    grows."""
    if len(labels) < 2:
        return
    columns = max(1, int(66 / (max(map(len, labels)) + 9)))
    rows = math.ceil(len(labels) / columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + max(0, rows - 3) * ROW_HEIGHT)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)),
                  handlelength=2.6, columnspacing=1.2)


# Where a label may stand: at which point of its line, offset in points, alignment. The first free place counts.
LABEL_PLACES = ((max, "x", (7, 0), "left", "center"), (max, "y", (0, 7), "center", "bottom"),
                (min, "x", (-7, 0), "right", "center"), (min, "y", (0, -7), "center", "top"))


def label_lines(figure, axis, handles):
    """Write the label of each line beside it; False, and no label, where one would touch a line or a label."""
    figure.draw_without_rendering()                     # places the axes
    points = [drawn_points(line) for line in axis.lines]
    taken = []
    texts = []
    for handle in handles:
        text = place_label(axis, handle, points, taken)
        if text is None:
            for written in texts:
                written.remove()
            return False
        texts.append(text)
        taken.append(text.get_window_extent())
    return True


def place_label(axis, handle, points, taken):
    """The label of a line as a text at the first free one of LABEL_PLACES; None if none is free."""
    data = [(x, y) for x, y in zip(*handle.get_data()) if math.isfinite(y)]
    if handle.get_transform() != axis.transData or not data:            # a level has no ends
        return None
    for pick, name, offset, side, height in LABEL_PLACES:
        point = pick(data, key=lambda point: point["xy".index(name)])
        text = axis.annotate(handle.get_label(), point, offset, textcoords="offset points", ha=side, va=height,
                             fontsize=8)
        box = text.get_window_extent()
        inside = axis.bbox.count_contains(box.corners()) == 4
        free = not any(box.overlaps(other) for other in taken)
        if inside and free and not any(box.contains(x, y) for some in points for x, y in some):
            return text
        text.remove()
    return None


def drawn_points(line):
    """Points of a line in pixels, about one a pixel."""
    corners = [(x, y) for x, y in line.get_transform().transform(line.get_xydata()) if math.isfinite(y)]
    found = list(corners) if line.get_marker() not in ("", "None") else []
    if line.get_linestyle() in ("", "None"):
        return found
    for (x, y), (x_next, y_next) in zip(corners, corners[1:]):
        count = max(1, int(max(abs(x_next - x), abs(y_next - y))))
        found += [(x + (x_next - x) * i / count, y + (y_next - y) * i / count) for i in range(count + 1)]
    return found


def span_of(numbers):
    """Numbers as "3", or as "1 to 3"."""
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def runs_of(groups):
    """How many runs a line stands on, as "1 run" or "2 to 3 runs". groups: lists, an entry for each run."""
    counts = [len(some) for some in groups if some]
    return f"{span_of(counts)} run{'s' if max(counts) > 1 else ''}"


# ------------------------------------------------------------------------------------------------ step curves

def window_of(n):
    """The width for `smooth` of n points: of fewer than ten it is 1, the points as they are."""
    return 1 + n // 10


def label_steps(axis, logs):
    """Write below an axis what a step of these logs is, with ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator
    trained = [event for log in logs for event in log if event["event"] == "train"]
    names = {"optimiser step": any("loss" in event for event in trained),
             "iteration": any("score" in event and "loss" not in event for event in trained)}     # RL
    axis.set_xlabel(" or ".join(name for name, found in names.items() if found) or "step")
    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))


def smooth(values, width):
    """Each value as the mean of those around it, about `width` of them, of fewer near both ends.

    As many lie before it as behind: a straight line stays one, and nothing is shifted.
    """
    out = []
    for i in range(len(values)):
        reach = min(width // 2, i, len(values) - 1 - i)
        window = values[i - reach:i + reach + 1]
        out.append(sum(window) / len(window))
    return out


def over_seeds(logs, event, name, smoothed=False):
    """(steps, means, lows, highs) of `name` in the events of one type, at the steps that every log has."""
    curves = [{e["step"]: float(e[name]) for e in log if e["event"] == event and name in e} for log in logs]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    width = window_of(len(steps)) if smoothed else 1
    columns = list(zip(*(smooth([curve[step] for step in steps], width) for curve in curves)))
    means = [sum(column) / len(column) for column in columns]
    return steps, means, [min(column) for column in columns], [max(column) for column in columns]


def draw_steps(figure, logs, fields, metric, items=""):
    """logs: {key: [events of a run]}; items: how many test items the metric stands on, for the title."""
    seen = [event for some in logs.values() for log in some for event in log]
    main = next((name for name in ("loss", "score")
                 if any(event["event"] == "train" and name in event for event in seen)), None)
    if main is None:
        raise UserError("--x step: these runs logged no steps of training; name a field instead of step")
    valid = [event for event in seen if event["event"] == "valid"]
    # of labels the training loss is a mean over tokens, that on valid one over labels
    same_mean = any("loss" in event and unit("loss", event) != "nats per label" for event in valid)
    beside = main == "loss" and same_mean
    below = any(metric in event for event in valid) and not (beside and metric == "loss")
    figure.set_size_inches(WIDTH, 4.2 if below else 2.5)
    axes = figure.subplots(2 if below else 1, 1, sharex=True, squeeze=False)[:, 0]
    handles = []
    smoothed = False
    for i, some in enumerate(logs.values()):
        style = style_of(i, len(logs))
        curve = over_seeds(some, "train", main, smoothed=True)
        smoothed = smoothed or window_of(len(curve[0])) > 1
        handle = draw_band(axes[0], curve, {**style, "marker": ""})
        if beside:
            draw_points(axes[0], some, "loss", {**style, "linestyle": ""})
        if below:
            handle = draw_points(axes[1], some, metric, style)
        handles.append(handle)
    over = runs_of(logs.values())
    if max(map(len, logs.values())) > 1:
        over = f"mean, range of {over}"
    points = "filled: valid, hollow: test" + (f", {items}" if items else "")
    title = f"line: training{', smoothed' * smoothed} ({over})"
    axes[0].set_title(title + f"\n{points}" * beside, loc="left")
    axes[0].set_ylabel("loss (nats)" if main == "loss" else "score")
    if below:
        axes[1].set_ylabel(metric.replace("_", " "))
        axes[1].set_title(points, loc="left")
    label_steps(axes[-1], [log for some in logs.values() for log in some])
    add_legend(figure, handles, [group_label(key, fields) for key in logs])


def draw_points(axis, logs, metric, style):
    """A metric on valid, filled, and before and after training on test, hollow. Returns the line of valid."""
    line = draw_band(axis, over_seeds(logs, "valid", metric), style)
    for event in ("baseline", "test"):
        steps, means, *_ = over_seeds(logs, event, metric)
        axis.plot(steps, means, **{**style, "linestyle": ""}, markerfacecolor="white")
    return line


def draw_band(axis, curve, style):
    """The mean as a line, the range as a band. Returns the line."""
    steps, means, lows, highs = curve
    axis.fill_between(steps, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
    return axis.plot(steps, means, **style)[0]


# ---------------------------------------------------------------------------------------- any field over any

CLOCKS = ("step", "tokens", "seconds")                  # they only rise, so they are not smoothed
KINDS = ("train", "valid")                              # events: the first kind that has both fields is drawn


def logged_fields(logs):
    """The names of the numbers in the events that `draw_logged` draws, in order. logs: lists of events."""
    events = [event for log in logs for event in log if event["event"] in KINDS]
    return list(dict.fromkeys(name for event in events for name, value in event.items() if is_plotted(value)))


def is_plotted(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def path_of(log, x, y):
    """{step: (x, y)} of the events of a run that have both, of one kind."""
    for kind in KINDS:
        found = {event["step"]: (event[x], event[y]) for event in log
                 if event["event"] == kind and is_plotted(event.get(x)) and is_plotted(event.get(y))}
        if found:
            return found
    return {}


def smoothed_path(points, x):
    """[(x, y), ...] -> two lists, smoothed; a clock is not."""
    xs, ys = map(list, zip(*points))
    width = window_of(len(points))
    return xs if x in CLOCKS else smooth(xs, width), smooth(ys, width)


def draw_logged(figure, logs, fields, x, ys):
    """The fields `ys` against the field x: of one group in one plot, of several in a plot for each y."""
    lines = {(key, y): [path_of(log, x, y) for log in some] for key, some in logs.items() for y in ys}
    lines = {line: [path for path in paths if path] for line, paths in lines.items()}
    every = [log for some in logs.values() for log in some]
    check_logged(every, x, ys, {y for (_, y), paths in lines.items() if paths})
    overlaid = len(logs) == 1
    figure.set_size_inches(WIDTH, 2.8 if overlaid else 0.6 + 1.9 * len(ys))
    axes = figure.subplots(1 if overlaid else len(ys), 1, sharex=True, squeeze=False)[:, 0]
    handles = {}
    for (key, y), paths in lines.items():
        if paths:
            axis = axes[0] if overlaid else axes[ys.index(y)]
            number, count = (ys.index(y), len(ys)) if overlaid else (list(logs).index(key), len(logs))
            handles[y if overlaid else key] = draw_paths(axis, paths, x, {**style_of(number, count), "marker": ""})
    for axis, y in zip(axes, ys):
        if not overlaid or len(ys) == 1:                # else the legend names them
            axis.set_ylabel(spoken(y))
    drawn = [path for paths in lines.values() for path in paths]
    title = runs_of(lines.values())
    if max(map(len, lines.values())) > 1:
        title = f"mean of {title}, thin: each"
    axes[0].set_title("smoothed; " * any(window_of(len(path)) > 1 for path in drawn) + title, loc="left")
    axes[-1].set_xlabel(spoken(x))
    if x == "step":
        label_steps(axes[-1], every)
    else:
        axes[-1].locator_params(axis="x", nbins=6)      # 120000 needs room
    labels = [spoken(name) if overlaid else group_label(name, fields) for name in handles]
    add_legend(figure, list(handles.values()), labels)


def check_logged(logs, x, ys, drawn):
    """Raises UserError for one of the fields `ys` that is not among those `drawn` against x."""
    known = logged_fields(logs)
    for y in ys:
        if y not in known:
            hint = did_you_mean(y, known) or f"; logged are {' '.join(known)}"
            raise UserError(f"--y {y}: no run logged it{hint}")
        if y not in drawn:
            raise UserError(f"--x {x} --y {y}: no run logged both together; name others, or draw each "
                            "against --x step")


def draw_paths(axis, paths, x, style):
    """Runs as thin lines, and their mean at the steps that all of them have. Returns the line of the mean."""
    if len(paths) > 1:
        for path in paths:
            axis.plot(*smoothed_path(list(path.values()), x), **{**style, "linewidth": 0.5, "alpha": 0.6})
    steps = sorted(set.intersection(*map(set, paths)))
    means = [tuple(sum(path[step][i] for path in paths) / len(paths) for i in (0, 1)) for step in steps]
    xs, ys = smoothed_path(means, x) if means else ([], [])
    return axis.plot(xs, ys, **style)[0]


def spoken(name):
    return name.replace("_", " ")


# -------------------------------------------------------------------------------------------- AdaLoRA's ranks

def mean_ranks(logs):
    """{module path: rank}, the mean of the last "ranks" of each log, of modules that all have; {} unless every
    log has them."""
    last = [next((event["ranks"] for event in reversed(log) if "ranks" in event), None) for log in logs]
    if not last or not all(last):
        return {}
    shared = [path for path in last[0] if all(path in ranks for ranks in last)]
    return {path: sum(ranks[path] for ranks in last) / len(last) for path in shared}


def draw_ranks(figure, logs, fields):
    kept = {key: mean_ranks(some) for key, some in logs.items()}
    kept = {key: ranks for key, ranks in kept.items() if ranks}
    if not kept:
        raise UserError("--x ranks: no run logged the ranks of its modules; they come with --method adalora")
    cells = {}                                          # path "blocks.3.attn.q" -> (row "q", column 3)
    for path in dict.fromkeys(path for ranks in kept.values() for path in ranks):
        match = re.fullmatch(r".*?(\d+)\.(?:.*\.)?(\w+)", path)
        if match:
            cells[path] = (match[2], int(match[1]))
    layers = sorted({layer for _, layer in cells.values()})
    words = list(dict.fromkeys(word for word, _ in cells.values()))
    width = min(7, max(2.2, 0.9 + 0.26 * len(layers)))
    figure.set_size_inches(width, (0.6 + 0.13 * (len(kept) > 1) + 0.26 * len(words)) * len(kept) + 0.3)
    largest = max(rank for ranks in kept.values() for rank in ranks.values())
    axes = figure.subplots(len(kept), 1, squeeze=False)[:, 0]
    for axis, (key, ranks) in zip(axes, kept.items()):
        grid = [[math.nan] * len(layers) for _ in words]
        for path, (word, layer) in cells.items():
            if path in ranks:
                row = words.index(word)
                column = layers.index(layer)
                grid[row][column] = ranks[path]
                axis.text(column, row, f"{ranks[path]:.3g}", ha="center", va="center", fontsize=7,
                          color="white" if ranks[path] > 0.75 * largest else "black")
        axis.imshow(grid, cmap="Greys", vmin=0, vmax=1.25 * max(largest, 1), aspect="auto")
        axis.set_xticks(range(len(layers)), layers)
        axis.set_yticks(range(len(words)), words)
        axis.grid(False)
        runs = f", mean of {len(logs[key])} runs" if len(logs[key]) > 1 else ", 1 run"
        label = f"\n{group_label(key, fields)}" if len(kept) > 1 else ""
        axis.set_title(f"rank kept{runs}{label}", loc="left")
    axes[-1].set_xlabel("layer")


# ------------------------------------------------------------------------------------------- overoptimisation

def rlhf_events(log):
    """The training events that hold gold reward, score and the root of the KL divergence."""
    needed = {"gold", "score", "sqrt_kl"}
    return [event for event in log if event["event"] == "train" and needed <= event.keys()]


def draw_overoptimisation(figure, logs, fields):
    paths = {key: [rlhf_events(log) for log in some] for key, some in logs.items()}
    paths = {key: [path for path in some if path] for key, some in paths.items() if any(some)}
    if not paths:
        seen = [event for some in logs.values() for log in some for event in log if event["event"] == "train"]
        if any({"score", "sqrt_kl"} <= event.keys() for event in seen):
            raise UserError("--x sqrt_kl: these runs logged no gold reward; train with --gold_reward "
                            "MODULE:FUNCTION, or draw the score alone by --x sqrt_kl --y score")
        raise UserError("--x sqrt_kl: no run logged gold and sqrt_kl; these come with --task ppo")
    figure.set_size_inches(WIDTH, 4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    handles = []
    for i, some in enumerate(paths.values()):
        style = {**style_of(i, len(paths)), "marker": ""}
        for path in some:
            width = window_of(len(path))
            x, gold, score = (smooth([float(event[name]) for event in path], width)
                              for name in ("sqrt_kl", "gold", "score"))
            line, = top.plot(x, gold, **style)
            bottom.plot(x, score, **style)
            peak = gold.index(max(gold))
            top.plot(x[peak], gold[peak], marker="o", color=style["color"], markerfacecolor="white", zorder=3)
        handles.append(line)
    smoothed = any(window_of(len(path)) > 1 for some in paths.values() for path in some)
    title = f"{runs_of(paths.values())}; ring: the highest gold reward"
    top.set_title("smoothed; " * smoothed + title, loc="left")
    top.set_ylabel("gold reward")
    bottom.set_ylabel("reward model's score")
    bottom.set_xlabel("√KL(policy ‖ reference), √nats")
    add_legend(figure, handles, [group_label(key, fields) for key in paths])
