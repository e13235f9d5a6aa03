"""data/runtime/run_files.py: read what a run left in its folder, checked once, here.

    read_run_config(folder) config.json: {"config": {flag: value}, hashes of code and inputs, facts}
    read_result(folder)     result.json; numbers that JSON lacks come back as floats
    read_events(folder)     log.jsonl: (events, number of lines that are no event)
    failure_reason(folder)  the reason in failed.json, None if the run did not fail
    resume_step(folder)     the step from which the same command goes on, None if it starts over

A file here may be torn, edited by hand or of another program. Whoever reads it through these functions gets
the types below or a DataError that names file, key and what belongs there; a key that is missing is no fault,
unless it is `required`. A line of log.jsonl that is no event is left out and counted, because a killed
process may have torn it.

Public: read_object, check_object, read_run_config, read_result, read_events, failure_reason, resume_step
"""
import json
import pathlib

from data.runtime.files import DataError, read_json, unique_keys

NON_FINITE = ("nan", "inf", "-inf")                 # as log.jsonl has them; NaN itself is no JSON


def is_text(x):
    return isinstance(x, str)


def is_number(x):
    if isinstance(x, float) or x in NON_FINITE:
        return True
    return isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2 ** 63


def is_count(x):
    return type(x) is int and 0 <= x < 2 ** 31


def is_finite(x):
    return type(x) in (int, float) and abs(x) < 2 ** 31


def is_list_of(check):
    return lambda x: isinstance(x, list) and all(map(check, x))


def is_object_of(check):
    return lambda x: isinstance(x, dict) and all(map(check, x.values()))


def is_flag_value(x):
    return not isinstance(x, dict) and (not isinstance(x, list) or not any(map(is_container, x)))


def is_container(x):
    return isinstance(x, (list, dict))


def is_hash(x):
    return is_text(x) or is_object_of(lambda y: is_text(y) or is_list_of(is_text)(y))(x)


def is_generations(x):
    """As data/results/pass_at_k.py writes them: n answers to each prompt, lists of a number for each prompt."""
    if not isinstance(x, dict) or not is_count(x.get("n")):
        return False
    lists = [x.get(name, []) for name in ("mean", "right", "majority")]
    if not all(is_list_of(lambda y: is_number(y) and not is_text(y))(some) for some in lists):
        return False
    means, right, majority = lists
    complete = len(means) > 0 and len(right) == len(majority) and len(right) in (0, len(means))
    return complete and all(is_count(c) and c <= x["n"] for c in right)


KINDS = {                                           # what an error calls it: its check
    "a string": is_text,
    "a string of 0 and 1": lambda x: is_text(x) and set(x) <= set("01"),
    "a string or null": lambda x: x is None or is_text(x),
    "n, and lists of a number for each prompt": is_generations,
    "a number": is_number,
    "an integer": lambda x: is_number(x) and isinstance(x, int),
    "a finite number": is_finite,
    "a finite number or null": lambda x: x is None or is_finite(x),
    "a number from 0 to 1": lambda x: is_finite(x) and 0 <= x <= 1,
    "a whole number": is_count,
    "a whole number or a list of them": lambda x: is_count(x) or is_list_of(is_count)(x),
    "true or false": lambda x: isinstance(x, bool),
    "a list of strings": is_list_of(is_text),
    "a string or a list of strings": lambda x: is_text(x) or is_list_of(is_text)(x),
    "an object": lambda x: isinstance(x, dict),
    "an object of numbers": is_object_of(is_number),
    "an object of strings, numbers and lists": is_object_of(is_flag_value),
    "a hash or an object of hashes": is_hash,
    "an object of hashes": lambda x: isinstance(x, dict) and is_hash(x),
    "an object of hashes or of objects of hashes": is_object_of(is_hash),
    "a list of objects of strings": is_list_of(is_object_of(is_text)),
}
CONFIG = {
    "config": "an object of strings, numbers and lists", "argv": "a list of strings", "id": "a string",
    "code": "a string", "code_hashes": "an object of hashes", "kept": "a list of strings",
    "test_items": "an integer", "test_unit": "a string", "test_sha256": "a string", "data_sha256": "a string",
    "base_sha256": "a string", "reward": "a hash or an object of hashes",
    "gold_reward": "a hash or an object of hashes", "inputs": "an object of hashes or of objects of hashes"}
NO_LONGER_STORED = ("save_every",)      # older runs have it among their flags; it changes nothing they compute
SELECTORS = {"task": "a string", "method": "a string"}          # of the flags in "config"
RESULT = {
    "status": "a string", "task": "a string", "method": "a string", "init": "a string", "data": "a string",
    "seed": "an integer", "metrics": "an object of numbers", "baseline_metrics": "an object of numbers",
    "params_total": "an integer", "params_trainable": "an integer", "adapter_bytes": "an integer",
    "model_bytes": "an integer", "out": "a string", "steps": "an integer", "tokens": "an integer",
    "seconds": "a finite number", "skipped": "an integer", "tokens_per_second": "a finite number",
    "peak_memory_mb": "a finite number or null", "samples": "a list of objects of strings",
    "item_correct": "a string of 0 and 1", "generations": "n, and lists of a number for each prompt",
    "next_command": "a string or null",
    "virtual_tokens": "a list of strings", "main_metric": "a string or null", "code": "a string", "kept": "a list of strings"}
EVENT = {"event": "a string", "step": "a number"}
FAILURE = {"reason": "a string"}


def read_object(path, kinds, required=()):
    """The object in a JSON file, its keys checked: kinds {key: one of KINDS}. Raises DataError."""
    value = read_json(path)
    check_object(value, kinds, required, path)
    return value


def check_object(value, kinds, required, where):
    """Raises DataError unless value is an object whose keys are of these kinds."""
    if not isinstance(value, dict):
        raise DataError(f"{where} holds {show(value)}, and an object belongs there")
    for key in required:
        if key not in value:
            raise DataError(f'{where} has no "{key}"')
    for key, kind in kinds.items():
        if key in value and not KINDS[kind](value[key]):
            raise DataError(f'{where}: "{key}" is {show(value[key])}, and {kind} belongs there')


def show(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def read_run_config(folder):
    """config.json of a run. Raises DataError, also where it is the config.json of a model."""
    path = pathlib.Path(folder) / "config.json"
    stored = read_object(path, CONFIG, ("config",))
    check_object(stored["config"], SELECTORS, (), f'{path}, "config"')
    for name in NO_LONGER_STORED:
        stored["config"].pop(name, None)
    return stored


def read_result(folder):
    """result.json of a run. Raises DataError."""
    result = read_object(pathlib.Path(folder) / "result.json", RESULT, ("metrics",))
    for key in ("metrics", "baseline_metrics"):
        if key in result:
            result[key] = {name: float(x) if is_text(x) else x for name, x in result[key].items()}
    return result


def read_events(folder):
    """(the events of log.jsonl, the number of lines that are none). ([], 0) without a file.

    Raises DataError if it is there and cannot be read.
    """
    path = pathlib.Path(folder) / "log.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror})") from e
    events = [event for event in map(parse_event, lines) if event]
    return events, len(lines) - len(events)


def parse_event(line):
    """A line of log.jsonl, bytes, as a dict; None if it is no event."""
    try:
        event = json.loads(line, object_pairs_hook=unique_keys)
        check_object(event, EVENT, EVENT, "a line")
    except (ValueError, RecursionError):            # DataError and UnicodeDecodeError are ValueErrors
        return None
    return None if is_text(event["step"]) else event


def failure_reason(folder):
    """Why a run failed, None if it has no failed.json. Raises DataError."""
    path = pathlib.Path(folder) / "failed.json"
    return read_object(path, FAILURE, ("reason",))["reason"] if path.exists() else None


def resume_step(folder):
    """The step of the last save, from which the same command goes on; None without a save. Raises DataError.

    Each save is an event of log.jsonl: {"event": "save", "step": ...}.
    """
    folder = pathlib.Path(folder)
    if not any((folder / name).exists() for name in ("state.pt", "state.prev.pt")):
        return None
    saves = [event["step"] for event in read_events(folder)[0] if event["event"] == "save"]
    return saves[-1] if saves else None
