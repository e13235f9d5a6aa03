"""data/sources.py: what fetch.py can fetch, and how a foreign archive or table becomes our JSONL.

A source is a list of files, each with its address, a ceiling in megabytes and its sha256. The hashes are
those of published manifests that agree with each other (models: also the hub's LFS ids; E2E: the checksums
that the `datasets` library shipped). None: no manifest was found, and nothing vouches for a first copy. The
addresses name a commit wherever there is one; E2E's and UCI's name none, and are pinned by the hash alone.

An archive is hostile until read: it may hold plain files and folders, inside the target, few of them, and no
bombs; all of that is checked before the first byte is written. What becomes of the data:

    sms_spam    {"text", "label"}, dealt 80/10/10 by a hash of the text: copies of a message share a split
    alpaca, tinyshakespeare    as they are; data/text/formats.py reads and splits them
    hh-rlhf     {"chosen", "rejected"}, whole transcripts of the helpful-base part; its own test split
    e2e         {"input", "output"} to train on, {"input", "outputs"} to score against; its own splits

Public: File, Source, MODELS, DATASETS, unpack
"""
import csv
import gzip
import hashlib
import json
import pathlib
import shutil
import stat
import tarfile
import tempfile
import typing
import zipfile
import zlib

from data.download import HUB
from data.runtime.files import DataError

GITHUB = "https://raw.githubusercontent.com"
MAX_FILES, MAX_BYTES, MAX_RATIO = 1000, 10 ** 9, 100    # of an archive: text shrinks to 1/10, bombs to 1/1000


class File(typing.NamedTuple):
    name: str
    url: str
    mb: int                                             # ceiling, in 10^6 bytes
    sha256: str | None


class Source(typing.NamedTuple):
    what: str                                           # and the licence
    files: list
    convert: typing.Callable | None = None              # folder -> {file name: rows}
    repo: str = ""                                      # models: the hub's name and commit
    revision: str = ""


def _model(what, mb, repo, revision, weights, config, tokenizer):
    pinned = {"config.json": config, "tokenizer.json": tokenizer[0], "tokenizer_config.json": tokenizer[1],
              "model.safetensors": weights}
    files = [File(name, f"{HUB}/{repo}/resolve/{revision}/{name}", 4 if name.endswith("json") else mb, sha256)
             for name, sha256 in pinned.items()]
    return Source(what, files, None, repo, revision)


# ---- archives and tables -----------------------------------------------------------------------------------
def _members(archive):
    """(name, size, "file" | "folder" | what else it is, how to open it) of each member of a zip or tar."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z:
            for m in z.infolist():
                mode = stat.S_IFMT(m.external_attr >> 16)           # 0: made on a system without modes
                kind = "folder" if m.is_dir() else "file" if mode in (0, stat.S_IFREG) else "link or device"
                yield m.filename, m.file_size, kind, lambda m=m: z.open(m)
    else:
        with tarfile.open(archive) as t:
            for m in t:
                kind = "folder" if m.isdir() else "file" if m.isreg() else "link or device"
                yield m.name, m.size, kind, lambda m=m: t.extractfile(m)


def unpack(archive, folder):
    """Extract a zip or tar into a fresh folder, or raise DataError; a refused archive has written nothing."""
    archive, folder = pathlib.Path(archive), pathlib.Path(folder)
    room, seen, total = min(MAX_BYTES, MAX_RATIO * archive.stat().st_size), set(), 0

    def refuse(name, why):
        raise DataError(f"{archive}: member {name!r} {why}; nothing was extracted, so get another copy")
    try:
        for name, size, kind, _ in _members(archive):           # lazily: a bomb is not read to its end
            path, total = name.replace("\\", "/"), total + size
            if path.startswith("/") or ".." in path.split("/") or ":" in path:
                refuse(name, "would land outside the target folder")
            if kind == "link or device":
                refuse(name, "is a link or a device, not a file")
            if path.casefold() in seen:
                refuse(name, "is there twice")
            seen.add(path.casefold())
            if len(seen) > MAX_FILES or size < 0 or total > room:
                refuse(name, f"is beyond {MAX_FILES} files or {room} bytes (a bomb?)")
        for name, _, kind, read in _members(archive):
            target = folder / name.replace("\\", "/")
            (target if kind == "folder" else target.parent).mkdir(parents=True, exist_ok=True)
            if kind == "file":
                with read() as f, open(target, "xb") as out:
                    shutil.copyfileobj(f, out)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError, OSError) as e:
        raise DataError(f"{archive} cannot be extracted ({e}); a sound zip or tar is needed") from e


def _sms(folder):
    parts = {"train": [], "valid": [], "test": []}
    with tempfile.TemporaryDirectory(dir=folder) as box:
        unpack(folder / "sms+spam+collection.zip", box)
        lines = (pathlib.Path(box) / "SMSSpamCollection").read_text(encoding="utf-8").split("\n")
    for line in filter(None, lines):
        label, text = line.split("\t", 1)
        if label not in ("ham", "spam"):
            raise ValueError(f"label {label!r} is neither ham nor spam")
        tenth = hashlib.sha256(text.strip().encode()).digest()[0] * 10 // 256
        parts[{8: "valid", 9: "test"}.get(tenth, "train")].append({"text": text.strip(), "label": label})
    return {f"{split}.jsonl": rows for split, rows in parts.items()}


def _hh(folder):
    def rows(name):
        with gzip.open(folder / name, "rt", encoding="utf-8") as f:
            for line in f:
                row = json.loads(line)
                yield {"chosen": row["chosen"], "rejected": row["rejected"]}
    return {f"{split}.jsonl": rows(f"{split}.jsonl.gz") for split in ("train", "test")}


def _e2e(folder):
    def pairs(name):
        with open(folder / name, encoding="utf-8-sig", newline="") as f:
            return [(row["mr"].strip(), row["ref"].strip()) for row in csv.DictReader(f)]

    def grouped(name):                                              # several people wrote for one input
        out = {}
        for mr, ref in pairs(name):
            out.setdefault(mr, []).append(ref)
        return [{"input": mr, "outputs": refs} for mr, refs in out.items()]
    return {"train.jsonl": [{"input": mr, "output": ref} for mr, ref in pairs("trainset.csv")],
            "valid.jsonl": grouped("devset.csv"), "test.jsonl": grouped("testset_w_refs.csv")}


# ---- the table ---------------------------------------------------------------------------------------------
_GPT2 = ("8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6",
         "5e04eb606e3a1583530a42e36c2a6b6615c86f34fe77e44d9ddeb43ff940931f")     # tokenizer.json, its config
_SMOL = ("9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
         "4bb9af56a342753d39374f4016a16574cab299fe088e896f425ce3c433f61424")
_CHAT = (_SMOL[0], "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df")
MODELS = {
    "gpt2": _model("GPT-2, 124M (MIT)", 549, "openai-community/gpt2",
                   "607a30d783dfa663caf39e06633721c8d4cfcd7e",
                   "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
                   "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4", _GPT2),
    "gpt2-medium": _model("GPT-2, 355M (MIT)", 1520, "openai-community/gpt2-medium",
                          "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                          "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
                          "ef1a44d889ad1a0acc7731c78134f1b87d2d222f110e97dd10fd4117331caf22", _GPT2),
    "gpt2-large": _model("GPT-2, 774M (MIT)", 3300, "openai-community/gpt2-large",
                         "32b71b12589c2f8d625668d2335a01cac3249519",
                         "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
                         "7fccdcfd6622055342a734c663ee0b61ff4fd697f42467595df0bf4448c8c170", (None, None)),
    "gpt2-xl": _model("GPT-2, 1.6B (MIT)", 6500, "openai-community/gpt2-xl",
                      "15ea56dee5df4983c59b2538573817e1667135e2",
                      "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
                      "be48115d52314bc27327e160bf10197760db02ea689d10adb24db4102edf7a8a", _GPT2),
    "smollm2-135m": _model("SmolLM2 (Apache-2.0)", 270, "HuggingFaceTB/SmolLM2-135M",
                           "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
                           "80521b40281d6ce74e35c9282c22539e75aa0ac8578892b2a59955ef78d55da1",
                           "1d556eab73b69c7f11f64c557a2f9c6f440bd4c6b89bb2584a6b498c92603843", _SMOL),
    "smollm2-135m-instruct": _model("SmolLM2, chat (Apache-2.0)", 270, "HuggingFaceTB/SmolLM2-135M-Instruct",
                                    "12fd25f77366fa6b3b4b768ec3050bf629380bac",
                                    "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
                                    "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
                                    _CHAT),
    "smollm2-360m": _model("SmolLM2 (Apache-2.0)", 724, "HuggingFaceTB/SmolLM2-360M",
                           "f8027fd0eaeea54caa13c31d31b9fdc459c38b49",
                           "7aaff6661428bed033abba9522bec81938678642cca3181fe752b6ca9e1e540f",
                           "34f7801487078de7e434e19162c497e5cc6ff397080e40e8586627cb68a5168a", _SMOL),
}
_HH = f"{HUB}/datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa/helpful-base"
_E2E = f"{GITHUB}/tuetschek/e2e-dataset/master"
_UCI = "https://archive.ics.uci.edu/static/public/228"
_ALPACA = f"{GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a"
_SHAKESPEARE = f"{GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
DATASETS = {
    "tinyshakespeare": Source("text to pre-train on, 1 MB (public domain)", [
        File("input.txt", f"{_SHAKESPEARE}/data/tinyshakespeare/input.txt", 2,
             "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")]),
    "sms_spam": Source("ham or spam, 5,574 messages (CC BY 4.0)", [
        File("sms+spam+collection.zip", f"{_UCI}/sms+spam+collection.zip", 1,
             "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3")], _sms),
    "alpaca": Source("52,002 instructions (CC BY-NC 4.0)", [
        File("alpaca_data.json", f"{_ALPACA}/alpaca_data.json", 25,
             "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419")]),
    "hh-rlhf": Source("46,189 preferences, helpful-base (MIT)", [
        File("train.jsonl.gz", f"{_HH}/train.jsonl.gz", 40,
             "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4"),
        File("test.jsonl.gz", f"{_HH}/test.jsonl.gz", 4,
             "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b")], _hh),
    "e2e": Source("restaurant data to text (CC BY-SA 4.0)", [
        File("trainset.csv", f"{_E2E}/trainset.csv", 10,
             "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6"),
        File("devset.csv", f"{_E2E}/devset.csv", 2,
             "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9"),
        File("testset_w_refs.csv", f"{_E2E}/testset_w_refs.csv", 2,
             "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd")], _e2e),
}
