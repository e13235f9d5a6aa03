"""sweep.py: many run folders, read: which are finished, what tells them apart, what their seeds say.

    a group      the runs that agree in the fields of --by. By default these are the fields in which the runs
                 differ, the seed excepted, less those that follow from fields before them: where every method
                 brings its own rate, `method` says it all. A flag that a run's method does not read is "-"

    mean ± sd    over the runs of a group; its 95 % interval is Student's t over seeds. It speaks of other
                 seeds on the same test items, not of other items
    one run      a proportion of test items has Wilson's interval, which speaks of other items, not of other
                 seeds; any other number has none, and neither has a group in which a seed comes twice

A run that is not finished is returned with what stopped it; nothing that looks like a run is left out.

Public: gather, events, value, shown, telling, order, group, numbers, main_metric, estimate
"""
import glob
import json
import math
import pathlib
import time

from data.files import DataError, read_json
from data.metrics import summary, wilson

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
