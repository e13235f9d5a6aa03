"""data/results/tables.py: many run folders, one table: means over seeds, honest intervals, paired differences.

    mean ± sd    over the runs of a group, and its 95 % interval: sweep.estimate
    bold         the best of those on the same data, if all have intervals and its own meets no other
    --compare    A - B by seed: Student's t over the differences of runs with equal seeds. By item, where runs
                 kept every item's outcome: the items' differences, averaged over the pairs; the two-sided
                 sign test is over the items that differ

a group      the runs that agree in the fields of --by. By default these are the fields in which the runs
                 differ, the seed excepted, less those that follow from fields before them: where every method
                 brings its own rate, `method` says it all. A flag that a run's method does not read is "-"

    mean ± sd    over the runs of a group; its 95 % interval is Student's t over seeds. It speaks of other
                 seeds on the same test items, not of other items
    one run      a proportion of test items has Wilson's interval, which speaks of other items, not of other
                 seeds; any other number has none, and neither has a group in which a seed comes twice

A run that is not finished is returned with what stopped it; nothing that looks like a run is left out.

Public: flags, show, best, compare, gather, events, value, shown, telling, order, group, numbers, main_metric,
estimate
"""
import difflib
import functools
import glob
import json
import math
import pathlib
import shutil
import textwrap
import time

from data.results.metrics import summary, wilson
from data.runtime.files import DataError, UserError, read_json
from data.runtime.run_folder import say

DASH = "-"
MAIN = ("f1", "exact_match", "accuracy", "gold", "score", "loss")      # what a run is about: the first it has
PROPORTIONS = ("exact_match", "accuracy")               # means of the outcomes in result.json's `right`
FALLING = ("loss", "perplexity", "forgetting", "kl", "sqrt_kl", "nll", "ece")       # less is better


# ---- runs --------------------------------------------------------------------------------------------------
def gather(patterns):
    """(finished runs, [(folder, why it is not in the table)]). A run: folder, its config.json, its result."""
    paths = sorted({pathlib.Path(p) for pattern in patterns for p in glob.glob(pattern)})
    for path in [p for p in paths if p.is_dir() and not is_run(p)]:     # --runs out means out/*
        paths += [p for p in sorted(path.iterdir()) if is_run(p) and p not in paths]
    runs, rest, seen = [], [], {}
    for path in filter(is_run, paths):
        try:
            if not (path / "result.json").exists():
                rest.append((path, unfinished(path)))
                continue
            told = read_json(path / "config.json")
            run = {**told, "folder": path, "result": read_json(path / "result.json")}
        except DataError as e:
            rest.append((path, str(e)))
            continue
        same = json.dumps([told.get(name) for name in ("config", "data_sha256", "base_sha256")])
        if (first := seen.setdefault(same, path)) != path:
            rest.append((path, f"the same run as {first}, so it counts once"))
        else:
            runs.append(run)
    return runs, rest


def is_run(path):
    return any((path / name).exists() for name in (".lock", "log.jsonl", "failed.json", "result.json"))


def unfinished(path):
    if (path / "failed.json").exists():
        return f"failed: {read_json(path / 'failed.json')['reason']}"
    log = events(path)
    if not log:
        return "stopped before its first step, or just begun; its command starts it again"
    ago = max(0, time.time() - (path / "log.jsonl").stat().st_mtime)
    ago = f"{ago:.0f} s" if ago < 120 else f"{ago / 60:.0f} min" if ago < 7200 else f"{ago / 3600:.0f} h"
    return f"unfinished: at step {log[-1]['step']}, {ago} ago; its command goes on from there"


def events(path):
    """The lines of log.jsonl; a torn last one is not there yet."""
    file = pathlib.Path(path) / "log.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


# ---- groups ------------------------------------------------------------------------------------------------
def value(run, name, meta):
    """A field of a run's config; None for one that its task and method do not read."""
    config = run["config"]
    field = meta(config.get("task")).get(name)
    if field and not (config.get("task") in field.metadata["tasks"]
                      and config.get("method") in field.metadata["methods"]):
        return None
    return config.get(name)


def shown(x):
    """A field's value as people write it: a folder by its last word."""
    if x is None:
        return DASH
    return f"{x:g}" if isinstance(x, float) else str(x).rstrip("/").split("/")[-1] if x != "" else '""'


def keys(run, by, meta):
    return tuple(value(run, name, meta) for name in by)


def telling(runs, meta):
    """The fields that tell runs apart: each one splits what those before it leave together."""
    by = []
    for name in dict.fromkeys(name for run in runs for name in run["config"]):
        finer = [*by, name]
        kinds, before = ({keys(r, names, meta) for r in runs} for names in (finer, by))
        if name != "seed" and len(kinds) > len(before):
            by = finer
    return by or ["method"]


def order(v):
    return (0, 0, "") if v is None else (1, v, "") if isinstance(v, (int, float)) else (2, 0, str(v))


def group(runs, by, meta):
    """{values of the fields: runs}, sorted: numbers by size, words by letters, "-" first."""
    out = {}
    for run in runs:
        out.setdefault(keys(run, by, meta), []).append(run)
    return dict(sorted(out.items(), key=lambda item: [order(v) for v in item[0]]))


def numbers(runs, metric):
    """The metric of each run that has it; what JSON could not hold is a string in there."""
    found = (r["result"].get("metrics", {}).get(metric, r["result"].get(metric)) for r in runs)
    return [float(x) for x in found if x is not None]


def main_metric(run):
    found = run["result"].get("metrics", {})
    return next((name for name in [*MAIN, *found] if name in found), None)


def estimate(runs, metric):
    """(mean, sd, low, high): over the seeds, or of one run by Wilson; nan where there is no such thing."""
    values = numbers(runs, metric)
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan, math.nan, math.nan
    mean, sd, half = summary(values)
    if len(values) == 1 and metric in PROPORTIONS and (right := runs[0]["result"].get("right")):
        return mean, sd, *wilson(right.count("1"), len(right))
    if len({r["config"].get("seed") for r in runs}) < len(runs):        # other settings differ in there, too
        half = math.nan
    return mean, sd, mean - half, mean + half


# ---- the command -------------------------------------------------------------------------------------------
def flags(parser, meta):
    """The flags of --task table. meta(task): {flag: field} of a run, which knows the methods that read it."""
    parser.description = "One table of many runs, and a picture of them."
    parser.set_defaults(meta=functools.cache(meta))
    add = parser.add_argument
    add("--task", help="table")
    add("--runs", nargs="+", default=["out/*"], help="run folders, or patterns for them (default out/*)")
    add("--by", help="fields to group by, as method,rank; default: those in which the runs differ")
    add("--across", metavar="FIELD", help="a matrix: a column for each value of this field, and one number, "
        "the first of --metric that a cell's runs have")
    add("--metric", help="what to show, as exact_match,loss; default: what each task is about")
    add("--compare", nargs=2, metavar=("A", "B"), help="paired difference of two groups: lora full, or "
        "rank=1 rank=8, or method=lora,rank=1 full")
    add("--markdown", action="store_true", help="the table in Markdown")
    add("--plot", metavar="FILE", help="draw a picture into this .svg, .png or .pdf")
    add("--x", help="what the picture runs over: step, ranks, sqrt_kl or a flag; default: what there is")
    return parser


def best(groups, metric):
    """The groups that win on their data beyond doubt: all intervals are known there, none meets theirs."""
    out, by_data = set(), {}
    for key, runs in groups.items():
        if numbers(runs, metric):
            sets = frozenset(r.get("data_sha256") for r in runs)
            by_data.setdefault(sets, []).append((key, estimate(runs, metric)))
    for found in by_data.values():
        sign = -1 if metric in FALLING else 1
        if len(found) > 1 and all(math.isfinite(e[2]) for _, e in found):
            first, *others = sorted(found, key=lambda item: -sign * item[1][0])
            low = min(sign * first[1][2], sign * first[1][3])
            if all(max(sign * e[2], sign * e[3]) < low for _, e in others):
                out.add(first[0])
    return out


# ---- A - B -------------------------------------------------------------------------------------------------
def select(runs, spec, by, meta):
    """The runs that `rank=8`, `lora` or `method=lora,rank=8` means, and the fields it speaks of."""
    said = {}
    for part in spec.split(","):
        name, equals, text = part.rpartition("=")
        fits = [f for f in ([name] if equals else by) if text in {shown(value(r, f, meta)) for r in runs}]
        if len(fits) != 1:
            known = {f: sorted({shown(value(r, f, meta)) for r in runs}) for f in by}
            known = "; ".join(f"{f}: {' '.join(values)}" for f, values in known.items())
            raise UserError(f"--compare {spec}: {part} is the value of {len(fits)} fields; there is {known}")
        said[fits[0]] = text
    return [r for r in runs if all(shown(value(r, f, meta)) == t for f, t in said.items())], said


def compare(runs, a, b, by, metric, meta):
    """A - B as lines of text; runs are paired by seed and by every field that both sides leave open."""
    (ours, said_a), (theirs, said_b) = select(runs, a, by, meta), select(runs, b, by, meta)
    open_ = [f for f in by if f not in {**said_a, **said_b} and all(
        value(r, f, meta) is not None for r in ours + theirs)]
    sides = []
    for spec, side in ((a, ours), (b, theirs)):
        found = group([r for r in side if numbers([r], metric)], [*open_, "seed"], meta)
        if twice := [k for k, rs in found.items() if len(rs) > 1]:
            one, two = found[twice[0]][:2]
            both = ((f, value(one, f, meta), value(two, f, meta)) for f in one["config"] if f != "out")
            more = next((f"{f}={shown(x)}" for f, x, y in both if x != y), "seed=1")
            raise UserError(f"--compare {spec} means both {one['folder']} and {two['folder']}; say more, as "
                            f"{spec},{more}")
        sides.append({k: rs[0] for k, rs in found.items()})
    pairs = [(sides[0][k], sides[1][k]) for k in sides[0] if k in sides[1]]
    if not pairs:
        raise UserError(f"--compare {a} {b}: no two runs have the same seed and both have {metric}")
    for x, y in pairs:
        if x.get("data_sha256") != y.get("data_sha256"):
            raise UserError(f"{x['folder']} and {y['folder']} were measured on different data; "
                            "a paired difference needs the same")
    alone = sum(map(len, sides)) - 2 * len(pairs)
    mean, sd, half = summary(numbers([x], metric)[0] - numbers([y], metric)[0] for x, y in pairs)
    lines = [f"{a} - {b}, {metric} ({'less' if metric in FALLING else 'more'} is better), "
             f"pairs of runs: {len(pairs)}" + f", runs without a partner: {alone}" * bool(alone)]
    lines.append(f"  by seed  {mean:+.4f}" + (" (one pair has no interval)" if len(pairs) < 2 else
                 f" ± {sd:.4f}  95 % [{mean - half:+.4f}, {mean + half:+.4f}], Student's t over pairs"))
    rights = [(x["result"].get("right", ""), y["result"].get("right", "")) for x, y in pairs]
    if metric not in PROPORTIONS or not all(x and len(x) == len(y) for x, y in rights):
        return [*lines, f"  by item  unknown: the runs keep no outcome per item for {metric}"]
    diffs = [sum(int(x[i]) - int(y[i]) for x, y in rights) / len(pairs) for i in range(len(rights[0][0]))]
    mean, _, half = summary(diffs)
    wins, losses = sum(d > 0 for d in diffs), sum(d < 0 for d in diffs)
    return [*lines, f"  by item  {mean:+.4f}           95 % [{mean - half:+.4f}, {mean + half:+.4f}], t over "
            f"{len(diffs)} items; better on {wins}, worse on {losses}, sign test p {sign(wins, losses):.2g}"]


def sign(wins, losses):
    """The two-sided sign test: how often fair coins fall at least as unevenly."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(max(wins, losses), n + 1)) / 2 ** n)


# ---- the table ---------------------------------------------------------------------------------------------
def cells(found):
    """An estimate as "mean ± sd" and "[low, high]", all with the mean's decimals."""
    mean, sd, low, high = found
    places = 1 if abs(mean) >= 100 else 5 if 0 < abs(mean) < 0.1 else 3
    return (f"{mean:.{places}f}" + f" ± {sd:.{places}f}" * math.isfinite(sd),
            f"[{low:.{places}f}, {high:.{places}f}]" if math.isfinite(low) else DASH)


def size(n):
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5 or unit == "GB":
            return f"{n:.{int(n < 10 and unit != 'B')}f} {unit}"
        n /= 1000


COSTS = {"params_trainable": "{:,.0f}".format, "adapter_bytes": size, "peak_memory_mb": "{:.0f} MB".format,
         "tokens_per_second": "{:,.0f}".format}


def table(groups, by, metrics):
    """Rows of cells, the first one the heads; a cell that wins ends in an asterisk."""
    wins = {metric: best(groups, metric) for metric in metrics}
    head = [name for metric in metrics for name in (metric, "95 %")]
    rows = [[*by, "runs", *head, "trainable", "stored", "memory", "tokens/s"]]
    for key, runs in groups.items():
        row = [*map(shown, key), str(len(runs))]
        for metric in metrics:
            if not numbers(runs, metric):
                row += [DASH, DASH]
                continue
            mean, interval = cells(estimate(runs, metric))
            row += [mean + "*" * (key in wins[metric]), interval]
        for name, text in COSTS.items():
            found = numbers(runs, name)
            row.append(text(summary(found)[0]) if found else DASH)
        rows.append(row)
    empty = {i for i, name in enumerate(rows[0]) if name == "95 %" and {row[i] for row in rows[1:]} == {DASH}}
    return [[cell for i, cell in enumerate(row) if i not in empty] for row in rows]


def matrix(groups, by, across, metrics):
    """Rows of cells, mean ± sd, in which the values of one field are the columns."""
    at, lines = by.index(across), {}
    for key, runs in groups.items():
        name = next((m for m in metrics or [main_metric(runs[0])] if numbers(runs, m)), None)
        lines.setdefault((*key[:at], *key[at + 1:]), {})[key[at]] = \
            cells(estimate(runs, name))[0] if name else DASH
    columns = sorted({key[at] for key in groups}, key=order)
    rest = [name for name in by if name != across]
    return [[*rest, *map(shown, columns)],
            *([*map(shown, key), *(found.get(c, DASH) for c in columns)] for key, found in lines.items())]


def aligned(rows, markdown):
    if markdown:
        bold = [[f"**{c[:-1]}**" if c.endswith("*") else c for c in row] for row in rows]
        return ["| " + " | ".join(row) + " |" for row in (bold[0], ["---"] * len(bold[0]), *bold[1:])]
    wide = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(w) if column == 0 else cell.rjust(w)
                      for column, (cell, w) in enumerate(zip(row, wide))).rstrip() for row in rows]


def show(options):
    """--task table. Returns the exit code."""
    meta = options.meta
    runs, rest = gather(options.runs)
    if not runs and not rest:
        raise UserError(f"--runs {' '.join(options.runs)}: no run folder is there; out/ is where they lie")
    known = dict.fromkeys(name for run in runs for name in run["config"])
    by = options.by.split(",") if options.by else telling(runs, meta)
    by += [options.across] * (options.across is not None and options.across not in by)
    for name in by + [options.x] * (options.x not in (None, "step", "ranks", "sqrt_kl")):
        if runs and name not in known:
            near = "".join(f"; did you mean {n}?" for n in difflib.get_close_matches(name, known, 1))
            raise UserError(f"{name} is no field of these runs{near}")
    metrics = options.metric.split(",") if options.metric else list(dict.fromkeys(
        [main_metric(r) for r in runs] + ["forgetting"]))
    present = {m for r in runs for m in r["result"].get("metrics", {})}
    if options.metric and runs and (wrong := [m for m in metrics if m not in present]):
        raise UserError(f"--metric {wrong[0]}: no run has it; there is {' '.join(sorted(present))}")
    metrics, groups = [m for m in metrics if m in present], group(runs, by, meta)
    if (options.compare or options.plot) and not metrics:
        raise UserError("no finished run with a metric is there, so nothing can be compared or drawn")
    if runs:
        rows = matrix(groups, by, options.across, options.metric and metrics) if options.across else \
            table(groups, by, metrics)
        say("\n".join(aligned(rows, options.markdown)))
        bold = any(cell.endswith("*") for row in rows[1:] for cell in row)
        say("\nmean ± sd over the runs of a row. 95 %: Student's t over seeds; of a single run, Wilson over "
            "test items (proportions only)" + "; * the best: no interval meets its own" * bold + ".")
        inner = [f for f in known if f != "seed" and any(len({shown(value(r, f, meta)) for r in rs}) > 1
                                                         for rs in groups.values())]
        if inner:
            say(f"Rows average over {', '.join(inner)}; --by {','.join(by + inner[:1])} splits them.")
    if options.compare:
        say("\n" + "\n".join(compare(runs, *options.compare, by, metrics[0], meta)))
    if rest:
        wide = shutil.get_terminal_size((200, 0)).columns - 2
        say(f"\nNot in the table, {len(rest)}:")
        for path, why in rest:
            say("  " + textwrap.shorten(f"{path}  {why}", wide, placeholder=" ..."))
    if options.plot:
        from data.results import plots              # here: plots reads this file's groups and estimates
        plots.draw(options.plot, groups, by, metrics[0], options.x)
        say(f"\n{options.plot}")
    return 0

