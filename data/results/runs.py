"""data/results/runs.py: read run folders, put runs into groups, estimate a metric of each group.

A run is a dict: "folder"; "config" {flag: value}; "result", which is result.json; the hashes of config.json.
Only the flags of its task and method are in "config". A field that a run does not have is shown as "-".
Three fields are no flags: `folder`, `date` (when the run finished) and `test` (below). `steps` is what the
run took, where the flag was not given.

test set    the test items of a run: their number and a hash of their content (config.json). Runs of different
            test sets are never compared or averaged. A run from before they were recorded stands with those
            of equal data and equally many items
definition  what a metric of one name means in a run, where that depends on more than the items (DEFINED_BY):
            a loss per token and one per label are not compared, nor are scores of two reward models
group       the runs that agree in the fields of --by. The default fields are those in which the runs differ,
            without the seed and without fields that follow from earlier ones: where each method has its own
            learning rate, `method` is enough. Flags that stood on a command line come first
code        one more field of "config". Runs of different code never share a group: group_fields adds `code`
            when there is more than one. Two runs have the same code if their hashes are equal, or if every
            definition that both executed has the same hash (config.json, "code_hashes"): a full and a LoRA
            run of one source tree have the same code, and so have runs before and after a new definition.
            The value shown is the hash of the first run with that code; "-" for runs without a hash
data_hash, base_hash, reward_hash, gold_reward_hash, inputs_hash
            fields of runs that have the same flags and differ in the content of that input. They separate
            groups as `code` does
input of a seed
            where each seed starts from its own model, as out/sft-s1 of seed 1 and out/sft-s2 of seed 2, the
            input's name ends in the run's seed. Such inputs, if no run of another seed has one of them, are one
            value, out/sft-s*: the runs share a group, and a KL or a score to one's own model is one metric
estimate    mean and sd (n - 1) over the runs of a group, with a 95 % interval:
    several runs    Student's t over seeds. It covers other seeds on the same test items, not other items.
                    There is none when a seed occurs twice: then other settings differ inside the group
    one run         Wilson's interval, if the metric is a proportion of test items or a mean of shares of
                    `prompts`; of pass@k, mean@n and majority@n that over prompts; of the score and the gold
                    reward of one answer to each prompt Student's t, from NAME_std. It covers other items, not
                    other seeds. Any other number has no interval

Public: gather, events, by_test_set, test_set, did_you_mean, group_fields, distinguishing_fields, group,
field_value, display_value, display_values, sort_key, known_fields, settings_of, mixed_fields, metric_names,
metric_values, valid_metrics, main_metric, measured_differently, estimate, format_estimate, item_values,
is_proportion, proportion_interval, lower_is_better, PROPORTIONS, VERSION_FIELDS
"""
import difflib
import glob
import json
import math
import pathlib
import re
import time

from data.results import metrics
from data.results.metrics import LOWER_IS_BETTER, half_width, summary, wilson
from data.results.pass_at_k import interval_of, prompt_values
from data.runtime.code_hash import changed, short_hash
from data.runtime.files import DataError
from data.runtime.run_files import (failure_reason, is_number, read_events, read_result, read_run_config,
                                    resume_step)

MISSING = "-"
PROPORTIONS = ("exact_match", "accuracy")               # means of result.json's "item_correct"
# {metric: what else it depends on}: flags, hashes of config.json, or numbers of result.json
DEFINED_BY = {"loss": ("targets", "classifier", "objective", "preference_loss", "beta",
                       "label_smoothing", "simpo_gamma", "orpo_lambda", "desirable_weight",
                       "undesirable_weight"),
              "perplexity": ("targets", "objective"), "forgetting": ("forgetting_data",),
              "kl": ("base_sha256",), "sqrt_kl": ("base_sha256",), "score": ("reward", "reward_weights"),
              "gold": ("gold_reward",),
              **dict.fromkeys(("pass", "majority", "mean"), ("task", "reward", "reward_weights", "gold_reward"))}    # pass@8
BEFORE = "before."                                      # before.loss: the loss before training
INPUT_HASHES = {"data_hash": "data_sha256", "base_hash": "base_sha256", "reward_hash": "reward",
                "gold_reward_hash": "gold_reward", "inputs_hash": "inputs"}  # field: its key in config.json
VERSION_FIELDS = ("code", *INPUT_HASHES)
NOTHING_MEASURED = "it measured nothing that a table compares; it has {}"
NO_SETTINGS = ("seed", "folder", "date", "test")        # fields that are no choice between two runs


# ------------------------------------------------------------------------------------------- reading folders

def gather(patterns):
    """(finished runs, [(folder, why it is not among them)]) of all run folders that match the glob patterns.

    A matching folder that is no run stands for the runs in it, so "out" means "out/*". A folder moved aside
    (NAME.<hash>) is a run like any other.
    """
    runs = []
    rest = []
    for path in run_folders(patterns):
        try:
            if (path / "result.json").exists():
                runs.append(read_run(path))
            else:
                rest.append((path, unfinished(path)))
        except DataError as e:
            rest.append((path, str(e)))
    unmeasured = [run for run in runs if run["result"]["metrics"] and main_metric(run) is None]
    rest += [(run["folder"], NOTHING_MEASURED.format(", ".join(run["result"]["metrics"])))
             for run in unmeasured]
    runs = [run for run in runs if run not in unmeasured]
    label_code(runs)
    label_inputs(runs)
    runs, repeated = drop_repeated(runs)
    label_tests(runs)
    for run in runs:
        label_facts(run)
    label_inputs_of_seeds(runs)
    return runs, rest + repeated


def run_folders(patterns):
    paths = {pathlib.Path(path) for pattern in patterns for path in glob.glob(pattern)}
    parents = [path for path in paths if path.is_dir() and not is_run(path)]
    for parent in parents:
        paths.update(parent.iterdir())
    return sorted(filter(is_run, paths))


def is_run(path):
    return any((path / name).exists() for name in (".lock", "log.jsonl", "failed.json", "result.json"))


def read_run(path):
    """A finished run. Raises DataError when one of its files is missing or damaged."""
    return {**read_run_config(path), "folder": path, "result": read_result(path)}


def unfinished(path):
    """Why a run has no result.json, in one sentence. Raises DataError."""
    reason = failure_reason(path)
    if reason is not None:
        return f"failed: {reason}"
    log = events(path)
    if not log:
        return "stopped before its first step, or just begun; the same command starts it again"
    seconds = max(0, time.time() - (path / "log.jsonl").stat().st_mtime)
    if seconds < 120:
        ago = f"{seconds:.0f} s"
    elif seconds < 7200:
        ago = f"{seconds / 60:.0f} min"
    else:
        ago = f"{seconds / 3600:.0f} h"
    saved = resume_step(path)
    how = "starts over, because nothing was saved" if saved is None else f"goes on from step {saved}"
    return f"unfinished: at step {log[-1]['step']}, {ago} ago; the same command {how}"


def events(path):
    """The events in log.jsonl, as dicts; torn lines are left out."""
    return read_events(path)[0]


def label_code(runs):
    """Set the field `code` of each run to the hash of the first run that has the same code, or to None."""
    versions = {}                                       # {label: {definition: hash}}
    for run in runs:
        code = run.get("code")
        hashes = run.get("code_hashes", {})
        label = code
        for known_label, known_hashes in versions.items():
            if code == known_label or same_code(known_hashes, hashes):
                label = known_label
                break
        if label is not None:
            versions.setdefault(label, {}).update(hashes)
        run["config"] = {**run["config"], "code": label}


def same_code(hashes, others):
    """Whether all definitions that are in both have the same hash, and some are."""
    shared = hashes.keys() & others.keys()
    return bool(shared) and not changed({name: hashes[name] for name in shared}, others)


def label_inputs(runs):
    """Set a field of INPUT_HASHES in runs with equal flags that differ in the content of that input."""
    for field, key in INPUT_HASHES.items():
        ignored = ["seed", "code"]
        if field == "base_hash":                        # a new model's weights depend on the seed
            ignored = ["code"]
        same_flags = {}
        for run in runs:
            flags = {name: value for name, value in run["config"].items() if name not in ignored}
            same_flags.setdefault(json.dumps(flags, sort_keys=True), []).append(run)
        for some in same_flags.values():
            if len({short_hash(run.get(key)) for run in some}) > 1:
                for run in some:
                    run["config"][field] = short_hash(run.get(key))


def drop_repeated(runs):
    """(runs, [(folder, reason)]): of runs with equal flags, code and inputs the first one counts."""
    first = {}
    repeated = []
    for run in runs:
        inputs = [run.get(key) for key in INPUT_HASHES.values()]
        identity = json.dumps([run["config"], inputs], sort_keys=True)
        if identity in first:
            reason = f"the same run as {first[identity]['folder']}, so it counts once"
            repeated.append((run["folder"], reason))
        else:
            first[identity] = run
    return list(first.values()), repeated


def label_facts(run):
    """Set the fields `folder` and `date`; and `steps`, behind all flags, where the flag was not given."""
    run["finished"] = (run["folder"] / "result.json").stat().st_mtime
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(run["finished"]))
    facts = {"folder": str(run["folder"]), "date": date}
    config = dict(run["config"])
    if config.get("steps") is None and run["result"].get("steps"):
        config.pop("steps", None)
        facts["steps"] = run["result"]["steps"]
    run["config"] = {**config, **facts}


def label_inputs_of_seeds(runs):
    """Give inputs that are named after their run's seed one name, with * for the seed, where several are."""
    hashes = {"data": "data_sha256", "init": "base_sha256", "reward": "reward"}
    for field, hash_key in hashes.items():
        named = {}                                      # {name with *: runs of inputs of that name}
        for run in runs:
            path = run["config"].get(field)
            if isinstance(path, str):
                named.setdefault(re.sub(r"-s\d+(?=$|[/,])", "-s*", path), []).append(run)
        for starred, some in named.items():
            inputs = {run["config"][field] for run in some}
            own = all(starred.replace("-s*", f"-s{run['config'].get('seed')}") == run["config"][field] for run in some)
            if len(inputs) > 1 and own:
                for run in some:
                    run["config"] = {**run["config"], field: starred}
                    run[hash_key] = starred             # a KL to the model of one's own seed is one metric


# ------------------------------------------------------------------------------------------------- test sets

def test_set(run):
    """(number of test items, a hash of them) of a run; see the header for a run that did not record them."""
    items = run.get("test_items", len(run["result"].get("item_correct", "")))
    if not items and isinstance(run["config"].get("eval_items"), int):
        items = run["config"]["eval_items"]
    return items or None, run.get("test_sha256", f"data {run.get('data_sha256')}")


def label_tests(runs):
    """Set the field `test` of each run: number of items and data, with a hash where two sets share these."""
    names = {}                                          # {test set: its name, after the first run}
    for run in runs:
        items = test_set(run)[0]
        unit = f"test {run.get('test_unit', 'items')}"
        count = unit if items is None else f"{items} {unit}"
        names.setdefault(test_set(run), f"{count} of {display_value(run['config'].get('data'))}")
    for run in runs:
        name = names[test_set(run)]
        if list(names.values()).count(name) > 1:
            name += f" ({short_hash(test_set(run)[1], 6)})"
        run["config"] = {**run["config"], "test": name}


def by_test_set(runs):
    """{name of the test set: its runs}, the one with the most items first."""
    tests = {}
    for run in runs:
        tests.setdefault(run["config"]["test"], []).append(run)
    return dict(sorted(tests.items(), key=lambda item: (-(test_set(item[1][0])[0] or 0), item[0])))


# ---------------------------------------------------------------------------------------------------- groups

def field_value(run, name):
    """A field of a run's config; None when its task and method do not have it."""
    value = run["config"].get(name)
    return tuple(value) if isinstance(value, list) else value


def display_value(value):
    """A field's value as a cell; of a path the last part."""
    if value is None:
        return MISSING
    if value == "":
        return '""'
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).rstrip("/").split("/")[-1]


def display_values(values):
    """A cell for each value; where two different paths have the same last part, the paths."""
    cells = {value: display_value(value) for value in values}
    shared = {cell for cell in cells.values() if list(cells.values()).count(cell) > 1}
    return [value if isinstance(value, str) and cells[value] in shared else cells[value] for value in values]


def did_you_mean(name, known):
    """The end of an error about an unknown name: the nearest of the known ones, or nothing."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def group_key(run, fields):
    return tuple(field_value(run, name) for name in fields)


def distinguishing_fields(runs, without=None):
    """The fields in which runs differ; each one separates runs that the fields before it leave together.

    without: a field that is not among them.
    """
    fields = []
    for name in settings_of(runs):
        if name == without:
            continue
        finer = [*fields, name]
        groups_before = {group_key(run, fields) for run in runs}
        groups_after = {group_key(run, finer) for run in runs}
        if len(groups_after) > len(groups_before):
            fields = finer
    return fields or ["method"]


def known_fields(runs):
    """The names of all fields, in the order of the configs."""
    return list(dict.fromkeys(name for run in runs for name in run["config"]))


def settings_of(runs):
    """The names of the fields that are choices: flags other than the seed, those on a command line first."""
    given = {word.partition("=")[0].removeprefix("--") for run in runs for word in run.get("argv", ())}
    names = [name for name in known_fields(runs) if name not in (*NO_SETTINGS, *VERSION_FIELDS)]
    return sorted(names, key=lambda name: name not in given)


def group_fields(runs, requested=None):
    """The fields requested, or else the distinguishing ones; and those of VERSION_FIELDS that differ.

    A request of seed, folder or date alone is one beside the distinguishing fields.
    `test` is added where these would put runs of two test sets into one group.
    """
    requested = requested or []
    chosen = [name for name in requested if name not in NO_SETTINGS] or distinguishing_fields(runs)
    fields = chosen + [name for name in requested if name in NO_SETTINGS]
    for name in VERSION_FIELDS:
        if name not in fields and len({field_value(run, name) for run in runs}) > 1:
            fields.append(name)
    if any(len({test_set(run) for run in some}) > 1 for some in group(runs, fields).values()):
        fields.append("test")
    return fields


def mixed_fields(runs, groups):
    """The flags, other than the seed, in which the runs of a group differ."""
    mixed = []
    for name in settings_of(runs):
        values = [{field_value(run, name) for run in some} for some in groups.values()]
        if any(len(some) > 1 for some in values):
            mixed.append(name)
    return mixed


def sort_key(value):
    """Sorts "-" first, then numbers by size, then words by letters."""
    if value is None:
        return (0, 0, "")
    if isinstance(value, (int, float)):
        return (1, value, "")
    return (2, 0, str(value))


def group(runs, fields):
    """{values of the fields: runs}, sorted."""
    groups = {}
    for run in runs:
        groups.setdefault(group_key(run, fields), []).append(run)
    return dict(sorted(groups.items(), key=lambda item: [sort_key(value) for value in item[0]]))


# --------------------------------------------------------------------------------------------------- numbers

def metric_values(runs, name):
    """A metric, or another number of result.json, of each run that has it; inf may be a string there.

    "before.NAME" is the metric before training.
    """
    values = [number_of(run, name) for run in runs]
    return [float(value) for value in values if value is not None]


def number_of(run, name):
    result = run["result"]
    if name.startswith(BEFORE):
        return result.get("baseline_metrics", {}).get(name.removeprefix(BEFORE))
    return result.get("metrics", {}).get(name, result.get(name))


def valid_metrics(run):
    """{metric: value} on valid of the weights that a run saved; {} where valid was not measured at their step.

    That is its last step, or, with --keep_best, the best one.
    """
    best = run["result"].get("best_valid")
    step = best.get("step") if isinstance(best, dict) else run["result"].get("steps")
    at_step = [event for event in events(run["folder"]) if event["event"] == "valid" and event["step"] == step]
    return {name: float(value) for event in at_step for name, value in event.items()
            if is_number(value) and name not in ("step", "tokens", "seconds")}


def metric_names(runs):
    """The names of all metrics that a run has; those before training begin with "before."."""
    names = dict.fromkeys(name for run in runs for name in run["result"].get("metrics", {}))
    return [*names, *dict.fromkeys(BEFORE + name for run in runs
                                   for name in run["result"].get("baseline_metrics", {}))]


def lower_is_better(metric):
    return metric.removeprefix(BEFORE) in LOWER_IS_BETTER


def definition(run, metric):
    """{name: value} of what a metric depends on in this run, besides its test items."""
    found = {}
    for name in DEFINED_BY.get(defined_as(metric), ()):
        value = number_of(run, name)
        if value is None and name != "targets":         # the flag of that name is LoRA's
            value = run.get(name, run["config"].get(name))
        if value is not None:
            found[name] = value
    return found


def defined_as(metric):
    """The name in DEFINED_BY: score_best_of_4 and before.gold_std depend on what score and gold depend on."""
    name = metric.removeprefix(BEFORE).partition("@")[0]
    first = name.partition("_")[0]
    return first if first in ("score", "gold") and name != "score_length_corr" else name


def measured_differently(runs, metric):
    """What keeps the runs that have the metric from being compared: "test", or names of DEFINED_BY."""
    having = [run for run in runs if metric_values([run], metric)]
    if len({test_set(run) for run in having}) > 1:
        return ["test"]
    found = [definition(run, metric) for run in having]
    names = dict.fromkeys(name for one in found for name in one)
    return [name for name in names if any(one.get(name) != found[0].get(name) for one in found)]


def main_metric(run):
    """The name of the metric that the run's task is about, or None (data/results/metrics.py)."""
    result = run["result"]
    return metrics.main_metric(result.get("metrics", {}), result.get("main_metric"))


def item_values(run, metric):
    """The numbers, one for each test item, whose mean is the metric; None where the run keeps none."""
    result = run["result"]
    item_correct = result.get("item_correct")
    if metric in PROPORTIONS and item_correct:
        return [int(outcome) for outcome in item_correct]
    return prompt_values(result.get("generations"), metric)


def item_interval(run, metric):
    """The 95 % interval over the test items of one run, (low, high); None where it keeps no values."""
    result = run["result"]
    if metric in PROPORTIONS:
        return proportion_interval(result, metric)
    if f"{metric}_std" in result.get("metrics", {}) and not result.get("generations"):
        mean = float(result["metrics"][metric])         # inf may be a string
        sd = float(result["metrics"][f"{metric}_std"])
        return mean_interval(mean, sd, test_set(run)[0] or 0)
    return interval_of(result.get("generations"), metric)


def proportion_interval(result, metric):
    """Wilson's interval of a metric of PROPORTIONS in result.json; None where it does not say of how many."""
    found = result.get("metrics", {})
    item_correct = result.get("item_correct")
    if metric in found and item_correct:
        return wilson(item_correct.count("1"), len(item_correct))
    if {metric, "prompts"} <= found.keys():             # a prompt's own share varies no more than 0 and 1 do
        return wilson(found["prompts"] * found[metric], found["prompts"])
    return None


def mean_interval(mean, sd, n):
    """Student's interval of the mean of n values, sd that of the values alone (divided by n, not n - 1).

    None where the values do not tell: one, or all equal.
    """
    if n < 2 or not 0 < sd < math.inf:
        return None
    half = half_width(sd * math.sqrt(n / (n - 1)), n)
    return mean - half, mean + half


def is_proportion(metric):
    """Whether a metric lies within 0 and 1."""
    return metric in PROPORTIONS or metric.startswith(("pass@", "majority@"))


def estimate(runs, metric):
    """(mean, sd, low, high) of a metric over the runs of a group; low and high bound the 95 % interval.

    Numbers that cannot be computed are nan; all four are when one of the runs has a value that is not finite,
    and when the runs measure different things (`measured_differently`).
    """
    runs = [run for run in runs if metric_values([run], metric)]
    values = metric_values(runs, metric)
    if not all(map(math.isfinite, values)) or measured_differently(runs, metric):
        return math.nan, math.nan, math.nan, math.nan
    mean, sd, half = summary(values)
    if len(values) == 1:
        low_high = item_interval(runs[0], metric)
        if low_high is not None:
            return mean, sd, *low_high
    seeds = {field_value(run, "seed") for run in runs}
    if len(seeds) < len(runs):
        half = math.nan
    return mean, sd, mean - half, mean + half


def format_estimate(numbers):
    """(mean, sd, low, high) -> "mean ± sd" and "[low, high]", with the same decimals."""
    mean, sd, low, high = numbers
    if abs(mean) >= 100:
        decimals = 1
    elif 0 < abs(mean) < 0.1:
        decimals = 5
    else:
        decimals = 3
    text = f"{round(mean, decimals) + 0.0:.{decimals}f}"      # + 0.0 turns -0.0 into 0.0
    if math.isfinite(sd):
        text += f" ± {sd:.{decimals}f}"
    return text, f"[{low:.{decimals}f}, {high:.{decimals}f}]" if math.isfinite(low) else MISSING
