"""data/checkpoints/model_folders.py: where a model is: a path, a run, an adapter on its base, or a name in the local cache.

Public: find, weights_folder, base_of, beneath, bottom_of, settings, portable
"""
import pathlib

from data.fetch import find_cached
from data.runtime.files import DataError, read_json

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def find(name, beside=None):
    """A folder by path, by path beside this file or a folder, or a model by its name in the local cache."""
    for path in (pathlib.Path(name), ROOT / name, *([beside / name] if beside else ())):
        if path.is_dir():
            return path
    if cached := find_cached(str(name)):
        return pathlib.Path(cached)
    raise DataError(f"{name}: no such folder, and no such model in the local cache; "
                    "`python data/fetch.py --list` names what can be fetched")


def weights_folder(name, beside=None):
    """Where the weights lie: inside a run folder; any other folder is its own answer."""
    folder = find(name, beside)
    if not (folder / "log.jsonl").exists():
        return folder
    for inner in (folder / "adapter", folder / "model"):
        if inner.is_dir() and (folder / "result.json").exists():
            return inner
    if (folder / "result.json").exists():
        raise DataError(f"{folder} is a run that trained nothing and holds no weights; name what it measured")
    raise DataError(f"{folder} is an unfinished run and holds no weights yet; give its command again")


def base_of(folder):
    """The folder under an adapter folder, or None for a plain model."""
    if not (folder / "adapter_config.json").exists():
        return None
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise DataError(f"{folder}/adapter_config.json names no base_model_name_or_path; add its folder")
    return weights_folder(base, folder)


def bottom_of(folder):
    """The plain model under any number of adapters."""
    folder = weights_folder(folder)
    while (base := base_of(folder)) is not None:
        folder = base
    return folder


def beneath(name):
    """What a prompt that goes on from here stands on: the model under a soft prompt, else the folder."""
    folder = weights_folder(name)
    path = folder / "adapter_config.json"
    kind = read_json(path).get("peft_type") if path.exists() else "LORA"
    return name if kind in ("LORA", "ADALORA", "IA3") else base_of(folder)


def settings(name):
    """What a run wrote beside its weights (template, labels ...); {} for a folder that is not ours."""
    path = weights_folder(name) / "run.json"
    return read_json(path) if path.exists() else {}


def portable(name):
    """A folder as it is written into other folders: inside this repository relative to it, else absolute."""
    path = find(name).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
