"""data/checkpoints/model_folders.py: the folder of a model's name, and the base of an adapter.

    name         a path, a path inside this repository, or the name of a fetched model
    run folder   its weights are in adapter/ or model/; an adapter names its base in adapter_config.json
    head         of a classifier or reward model: head.safetensors; in a SEQ_CLS adapter of peft, score.weight

Public: find, weights_folder, base_of, folders, root_model, settings, read_head, portable, hash_folder
"""
import hashlib
import pathlib

from data.checkpoints.hf import read_config
from data.checkpoints.peft import read_adapter_config
from data.checkpoints.safetensors import read_tensors
from data.runtime import cache
from data.runtime.files import DataError, check_path
from data.runtime.run_files import read_object

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SETTINGS = {"task": "a string", "method": "a string", "template": "a string", "system": "a string or null",
            "labels": "a list of strings", "question": "a string or null", "classifier": "a string",
            "attention": "a string", "objective": "a string", "parse_special": "true or false",
            "quant": "a string", "double_quant": "true or false", "quant_source": "a string",
            "row_type": "a string", "turns": "a whole number", "systems": "a whole number"}


def find(name, beside=None):
    """The folder of a name: a path, a path inside this repository or a folder `beside`, or a fetched model.

    Raises DataError when there is none.
    """
    check_path(name)
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
    """The folder of the base under an adapter folder (pathlib.Path); None for a plain model. DataError."""
    path = folder / "adapter_config.json"
    if not path.exists():
        return None
    base = read_adapter_config(folder).get("base_model_name_or_path")
    if not base:
        raise DataError(f"{path} has no base_model_name_or_path; add the folder of the base model")
    try:
        return weights_folder(base, folder)
    except DataError as e:
        raise DataError(f"{path}: its base_model_name_or_path leads to no base: {e}; if it was moved, write its new "
                        "place there") from None


def folders(name):
    """The folder of a model's weights, then those that it stands on, down to the plain model.

    Raises DataError for adapters that are each other's base.
    """
    found = {}                                          # {path without links: folder}
    folder = weights_folder(name)
    while folder is not None:
        if folder.resolve() in found:
            ring = " -> ".join(map(str, [*found.values(), folder]))
            raise DataError(f"{folder}/adapter_config.json: its base_model_name_or_path leads back to itself "
                            f"({ring}); name the plain model there")
        found[folder.resolve()] = folder
        folder = base_of(folder)
    return list(found.values())


def root_model(name):
    """The plain model under any number of adapters."""
    return folders(name)[-1]


def settings(name):
    """What a run has saved beside its weights (template, labels, ...); {} for a model of another tool.

    A SEQ_CLS adapter of peft is a classifier by a head, which reads a text as its tokenizer gives it.
    Raises DataError.
    """
    folder = weights_folder(name)
    path = folder / "run.json"
    stored = read_object(path, SETTINGS) if path.exists() else {}
    if stored.get("task") or not (folder / "adapter_config.json").exists():
        return stored
    task_type = read_adapter_config(folder).get("task_type")
    if task_type != "SEQ_CLS":
        return stored
    return {**stored, "task_type": task_type, "classifier": "head", "labels": head_labels(folder),
            "template": "raw", "system": "", "question": ""}


def head_labels(folder):
    """The labels of a SEQ_CLS adapter: id2label in a config.json beside it or of its base, else 0, 1, ...
    """
    count = len(read_head(folder)["weight"])
    for place in (folder, root_model(folder)):
        path = place / "config.json"
        names = read_object(path, {}).get("id2label") if path.exists() else None
        if isinstance(names, dict) and set(names) == set(map(str, range(count))):
            labels = [names[str(i)] for i in range(count)]
            if all(isinstance(label, str) and label != f"LABEL_{i}" for i, label in enumerate(labels)):
                return labels
    return [str(i) for i in range(count)]


def read_head(name):
    """{name: tensor} of the head that was trained beside a model: weight and perhaps more; {} without one.

    Raises DataError for one that does not fit the model.
    """
    folder = weights_folder(name)
    path = folder / "head.safetensors"
    if path.exists():
        stored = read_tensors(path)
        prefix = "score."
    elif (folder / "adapter_config.json").exists() and \
            read_adapter_config(folder).get("task_type") == "SEQ_CLS":
        path = folder / "adapter_model.safetensors"
        prefix = "base_model.model.score."
        stored = {name: t for name, t in read_tensors(path).items() if name.startswith(prefix)}
    else:
        return {}
    head = {name.removeprefix(prefix): t for name, t in stored.items()}
    width = read_config(root_model(folder))["n_embd"]
    weight = head.get("weight")
    if weight is None or weight.dim() not in (1, 2) or weight.size(-1) != width:
        found = "missing" if weight is None else f"{list(weight.shape)}"
        raise DataError(f"{path}: {prefix}weight is {found}; a head of this model is [{width}] or "
                        f"[labels, {width}]")
    return head


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
            if path.is_file() and path.suffix in (".json", ".safetensors", ".txt", ".jinja"):
                with open(path, "rb") as f:
                    digest.update(path.name.encode() + hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()
