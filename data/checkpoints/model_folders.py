"""data/checkpoints/model_folders.py: the folder of a model's name, and the base of an adapter.

    name         a path, a path inside this repository, or the name of a fetched model
    run folder   its weights are in adapter/ or model/; an adapter names its base in adapter_config.json

Public: find, weights_folder, base_of, adapter_config, folders, root_model, settings, portable, hash_folder
"""
import hashlib
import pathlib

from data.runtime import cache
from data.runtime.files import DataError
from data.runtime.run_files import read_object

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ADAPTER_CONFIG = {"base_model_name_or_path": "a string or null", "peft_type": "a string"}
SETTINGS = {"task": "a string", "method": "a string", "template": "a string", "system": "a string or null",
            "labels": "a list of strings", "question": "a string or null", "classifier": "a string",
            "attention": "a string", "objective": "a string", "quant": "a string",
            "double_quant": "true or false"}


def find(name, beside=None):
    """The folder of a name: a path, a path inside this repository or a folder `beside`, or a fetched model.

    Raises DataError when there is none.
    """
    candidates = [pathlib.Path(name), ROOT / name]
    if beside:
        candidates.append(beside / name)
    for path in candidates:
        if path.is_dir():
            return path
    cached = cache.find_model(str(name))
    if cached:
        return cached
    if str(name) in cache.MODELS:
        raise DataError(f"{name} is neither a folder nor in the local cache; run python data/fetch.py {name}")
    raise DataError(f"{name}: no such folder, and no such model in the local cache; "
                    "python data/fetch.py --list names what can be fetched")


def weights_folder(name, beside=None):
    """The folder that holds the weights: adapter/ or model/ of a run, else the folder itself.

    Raises DataError for a run that is not finished, or that trained nothing.
    """
    folder = find(name, beside)
    if not (folder / "log.jsonl").exists():
        return folder
    if not (folder / "result.json").exists():
        raise DataError(f"{folder} is an unfinished run and holds no weights yet; give its command again")
    for inner in (folder / "adapter", folder / "model"):
        if inner.is_dir():
            return inner
    raise DataError(f"{folder} is a run that trained nothing and holds no weights; name the model that it "
                    "evaluated")


def base_of(folder):
    """The folder of the base under an adapter folder (pathlib.Path); None for a plain model."""
    config = folder / "adapter_config.json"
    if not config.exists():
        return None
    base = adapter_config(folder).get("base_model_name_or_path")
    if not base:
        raise DataError(f"{config} has no base_model_name_or_path; add the folder of the base model")
    return weights_folder(base, folder)


def adapter_config(folder):
    """adapter_config.json of an adapter folder, an object. Raises DataError."""
    return read_object(pathlib.Path(folder) / "adapter_config.json", ADAPTER_CONFIG)


def folders(name):
    """The folder of a model's weights, then those that it stands on, down to the plain model."""
    folder = weights_folder(name)
    while folder is not None:
        yield folder
        folder = base_of(folder)


def root_model(name):
    """The plain model under any number of adapters."""
    *_, root = folders(name)
    return root


def settings(name):
    """What a run has saved beside its weights (template, labels, ...); {} for a folder of another tool.

    Raises DataError for a damaged run.json.
    """
    path = weights_folder(name) / "run.json"
    return read_object(path, SETTINGS) if path.exists() else {}


def portable(name):
    """A folder as written into other folders: relative to this repository if inside it, else absolute."""
    path = find(name).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def hash_folder(name):
    """A hash of weights, configs and tokenizer in a model folder, and in those that it stands on.

    DataError.
    """
    digest = hashlib.sha256()
    for folder in folders(name):
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".txt", ".jinja"):
                with open(path, "rb") as f:
                    digest.update(path.name.encode() + hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()
