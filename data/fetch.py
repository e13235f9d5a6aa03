"""data/fetch.py: real models and data, every file known by its sha256 before it is asked for.

    python data/fetch.py --list
    python data/fetch.py gpt2                  into the Hugging Face cache; then train.py --init gpt2
    python data/fetch.py sms_spam              into out/data/sms_spam, as train, valid and test.jsonl
    python data/fetch.py e2e --from FOLDER     from copies that you have, checked like a download

data/sources.py says what there is, data/download.py how a file arrives. A file that is right is neither
asked for again nor touched; one that nobody published a hash of is taken on trust the first time, which is
said, and its hash stays beside it in NAME.sha256.

HF_ENDPOINT (a mirror), HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN are honoured. A model without --out
goes where the Hugging Face libraries would put it, and what they put there is used. Training asks
find_cached, which looks at the disk and never at the network.

Exit codes: 0 done, 2 usage, 65 no good data to be had, 75 interrupted (the same command goes on).

Public: fetch, find_cached
"""
import argparse
import csv
import difflib
import json
import os
import pathlib
import sys
import zlib

if __name__ == "__main__":                              # a script's path starts in data/, not beside train.py
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from data.download import HUB, download, sha256                         # noqa: E402
from data.runtime.files import DataError, UserError, atomic, write_atomic       # noqa: E402
from data.sources import DATASETS, MODELS                               # noqa: E402


def say(text):
    """stderr is progress, stdout is results."""
    print(text, file=sys.stderr, flush=True)


def _cache(repo):
    """Where the Hugging Face libraries keep a model."""
    env = os.environ.get
    home = env("HF_HOME") or os.path.join(env("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = pathlib.Path(env("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    return hub / f"models--{repo.replace('/', '--')}"


def find_cached(name):
    """The folder of a model in the Hugging Face cache, by its name here or as ORG/NAME, or None."""
    known = MODELS.get(name)
    for repo in ((known.repo, name) if known else (name,)):     # "gpt2" was a whole repository name, once
        base = _cache(repo)
        found = {p.name: p for p in base.glob("snapshots/*") if (p / "config.json").is_file() and any(
            (p / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))}
        main = base / "refs" / "main"
        main = main.read_text().strip() if main.is_file() else None
        for revision in (known.revision if known else main, main, *sorted(found)):
            if revision in found:
                return found[revision]
    return None


def _copy(name, file, names, source, target):
    """--from: the file itself, or a folder that holds it."""
    path = source / file.name if source.is_dir() else source
    if not path.is_file() or len(names) > 1 and path.name != file.name:
        raise DataError(f"--from {source}: no {file.name} there; give a folder with {', '.join(names)}")
    if path.stat().st_size > file.mb * 10 ** 6 or file.sha256 and sha256(path) != file.sha256:
        raise DataError(f"{path} is not the {file.name} expected (another size or sha256); get another copy")
    with open(path, "rb") as f, atomic(target) as out:
        while chunk := f.read(1 << 20):
            out.write(chunk)


def _obtain(name, file, names, target, source):
    """One file, unless it is there; afterwards it is right, or said to be unverified."""
    note = target.with_name(target.name + ".sha256")
    known = file.sha256 or note.is_file() and note.read_text()[:64]
    if target.exists():
        if not known:
            return say(f"{target} is there; no published sha256 is known to check it with")
        if sha256(target) == known:
            return say(f"{target} is there and right")
        if not file.sha256:
            raise DataError(f"{target} has changed since it came; delete it and {note.name} to fetch anew")
        say(f"{target} is not the file expected (another sha256), so it is fetched again")
    if source:
        _copy(name, file, names, source, target)
    elif any(os.environ.get(k, "").upper() in ("1", "ON", "YES", "TRUE")
             for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        raise DataError(f"HF_HUB_OFFLINE is set, so {file.url} is not asked for; bring a copy and say "
                        f"python data/fetch.py {name} --from FOLDER, with {', '.join(names)} in it")
    else:
        mirror = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        url = mirror + file.url[len(HUB):] if file.url.startswith(HUB + "/") else file.url
        download(url, target, file.sha256, file.mb * 10 ** 6)
    if file.sha256:
        return say(f"{target} came, and is right")
    write_atomic(note, f"{sha256(target)}  {target.name}\n")            # the form that `sha256sum -c` reads
    say(f"{target} came, NOT VERIFIED: no published sha256 is known; {note.name} keeps what this one has")


def _convert(name, convert, folder):
    """Our JSONL beside the files that came. What is there stays: it may have been edited."""
    try:
        for target, rows in convert(folder).items():
            if not (folder / target).exists():
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                write_atomic(folder / target, "".join(lines))
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OSError, EOFError, zlib.error,
            csv.Error) as e:
        raise DataError(f"{folder}: the files of {name} do not read as they should ({e!r}); delete them and "
                        "fetch them again") from e


def fetch(name, out=None, source=None):
    """All of one source; returns the path to give to --init or --data."""
    known = {**MODELS, **DATASETS}
    if name not in known:
        near = "".join(f" (did you mean {n}?)" for n in difflib.get_close_matches(name, known, 1))
        raise UserError(f"{name} is not known here{near}; known are {', '.join(known)}; any other folder of "
                        "a Hugging Face model can be given to --init as it is")
    _, files, convert, repo, revision = known[name]
    cached = find_cached(name) if repo and not (out or source) else None
    if cached and cached.name != revision:
        say(f"{cached} holds revision {cached.name}, not {revision}: used as it is, not checked")
        return cached
    home = _cache(repo) / "snapshots" / revision if repo else pathlib.Path("out", "data", name)
    folder = pathlib.Path(out) if out else cached or home
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        _obtain(name, file, [f.name for f in files], folder / file.name, source and pathlib.Path(source))
    if repo:
        main = _cache(repo) / "refs" / "main"
        if folder == home and not main.exists():                # other tools then find it by name, offline
            main.parent.mkdir(exist_ok=True)
            write_atomic(main, revision)
        return folder
    if not convert:
        return folder / files[0].name
    _convert(name, convert, folder)
    return folder


def main(argv=None):
    parser = argparse.ArgumentParser("fetch.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="what to fetch: see --list")
    parser.add_argument("--out", metavar="DIR", help="default: the Hugging Face cache, or out/data/NAME")
    parser.add_argument("--from", dest="source", metavar="PATH", help="copy from this file or folder instead")
    parser.add_argument("--list", action="store_true", help="what can be fetched, its size and licence")
    args = parser.parse_args(argv)
    if args.list:
        for name, (what, files, *_) in {**MODELS, **DATASETS}.items():
            open_ = [f.name for f in files if not f.sha256]
            print(f"{name:22} {sum(f.mb for f in files):5} MB at most  {what}"
                  + f"; no known sha256: {', '.join(open_)}" * bool(open_))
        return 0
    if not args.name:
        parser.error("which one? give a name, or --list")
    try:
        path = fetch(args.name, args.out, args.source)
    except UserError as e:
        say(f"fetch.py: {e}")
        return e.code
    except OSError as e:
        say(f"fetch.py: {e.filename} cannot be used ({e.strerror}); choose another folder with --out")
        return 2
    except KeyboardInterrupt:
        say("fetch.py: interrupted; the same command goes on where it stopped")
        return 75
    use = f"--init {path if args.out else args.name}" if args.name in MODELS else f"--data {path}"
    print(f"{path}\npython train.py {use}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
