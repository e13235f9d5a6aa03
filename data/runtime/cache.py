"""data/runtime/cache.py: what can be fetched, and where it lies on this disk. It never touches the network.

    sources  data/sources.tsv: name, content and licence, largest size in MB, sha256 and address of each file
    models   the Hugging Face cache, as its own libraries lay it out: HF_HUB_CACHE, else HF_HOME/hub, else
             ~/.cache/huggingface/hub; in it models--ORG--NAME/snapshots/REVISION
    data     out/data/NAME below the working directory, complete once source.json is there (written last)

data/fetch.py fills both. --init and --data look here for a name that is not a path.

Public: File, SOURCES, MODELS, DATASETS, RECORD, model_cache, data_folder, find_model, find_data
"""
import glob
import os
import pathlib
import re
import typing

TABLE = pathlib.Path(__file__).resolve().parent.parent / "sources.tsv"
RECORD = "source.json"


class File(typing.NamedTuple):
    about: str                                          # the content and licence of its model or data set
    mb: int                                             # the largest size, in 10^6 bytes
    sha256: str
    url: str

    @property
    def name(self):
        return self.url.rpartition("/")[2]


def _read_sources():
    sources = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]:
        name, about, mb, sha256, url = line.split("\t")
        sources.setdefault(name, []).append(File(about, int(mb), sha256, url))
    return sources


def _models(sources):
    """{name: (repository, revision)} of the sources that are models on the Hugging Face hub."""
    addresses = {name: re.match(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/([^/]+)/", files[0].url)
                 for name, files in sources.items()}
    return {name: match.groups() for name, match in addresses.items() if match}


SOURCES = _read_sources()                               # name: its files
MODELS = _models(SOURCES)
DATASETS = [name for name in SOURCES if name not in MODELS]


def model_cache(repo):
    """The folder of one repository ("ORG/NAME") in the Hugging Face cache, whether it exists or not."""
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return pathlib.Path(hub).expanduser() / f"models--{repo.replace('/', '--')}"


def data_folder(name):
    """Where data/fetch.py puts a data set unless --out is given."""
    return pathlib.Path("out", "data", name)


def _has_model(folder):
    weights = ("model.safetensors", "model.safetensors.index.json")
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights)


def find_model(name):
    """The snapshot of a model in the Hugging Face cache, by its name in MODELS or as ORG/NAME, or None.

    First the pinned revision, then the one that refs/main names, then any other with safetensors weights.
    """
    repo, revision = MODELS.get(name, (name, None))
    for base in (model_cache(repo), model_cache(name)):         # the hub's "gpt2" had no ORG before 2024
        found = sorted(glob.glob(os.path.join(glob.escape(str(base)), "snapshots", "*")))
        snapshots = {os.path.basename(path): pathlib.Path(path) for path in found if _has_model(pathlib.Path(path))}
        main = base / "refs" / "main"
        main = main.read_text().strip() if main.is_file() else None
        for candidate in (revision, main, *snapshots):
            if candidate in snapshots:
                return snapshots[candidate]
    return None


def find_data(name):
    """The folder of a data set that was fetched by this name, or None."""
    folder = data_folder(name)
    is_name = pathlib.PurePath(name).name == name               # neither a path nor ".."
    return folder if is_name and (folder / RECORD).is_file() else None
