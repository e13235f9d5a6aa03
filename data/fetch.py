"""data/fetch.py: fetch real models and data sets. The only program here that touches the network.

    python data/fetch.py --list
    python data/fetch.py smollm2-135m            then  python train.py --init smollm2-135m
    python data/fetch.py sms_spam                then  python train.py --task classify --data sms_spam
    python data/fetch.py sms_spam --from PATH    a copy of the file, or a folder with FILE or NAME__FILE in it

data/sources.tsv pins every file: an address that names a commit, a largest size, a sha256. A --from copy is
checked too; --unverified accepts one with another sha256, warns, and notes it in source.json.

Bytes go to FILE.part, which is renamed once its sha256 is right; a part is resumed with a Range request, also
by the next command. Cuts, time-outs and statuses 408, 429 and 5xx are retried after 1, 2, 4 and 8 seconds.
All attempts at a file together end after a minute and the time that its largest size takes at MIN_RATE.
Every hop of a redirect is https (or http within this machine). HF_TOKEN is sent to https://huggingface.co
only. HF_ENDPOINT (a mirror of the hub), HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE are honoured.

Models go into the Hugging Face cache; data sets to out/data/NAME, as rows for data/text/formats.py. The files
these come from are deleted, and source.json, written last, marks a complete folder. Splits:

    tinyshakespeare          train.txt, whose last tenth data/text/formats.py validates and tests on
    sms_spam, alpaca         by a hash of the message or instruction: 70 % train, 10 % valid, 20 % test
    e2e_ratings              the same, by the input. Of five texts rated together every two are a preference,
                             by majority of the raters, ties left out; columns about raters are never read
    instruct, instruct_pref  in order: 85 % train, 10 % test, 5 % valid, as in the book they come from
    e2e, wnut17, hh-rlhf     their own. --from may lack the test file of wnut17; valid is then tested on

Exit codes: 0 done, 2 usage, 65 bad data, 75 interrupted (the same command resumes).

Public: fetch, download, read_zip, sha256, CONVERTERS
"""
import argparse
import csv
import gzip
import hashlib
import http.client
import io
import itertools
import json
import os
import pathlib
import re
import stat
import struct
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib

from tqdm import tqdm

if __name__ == "__main__":                              # a script's path starts in data/, not beside train.py
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from data.runtime import cache                                                  # noqa: E402
from data.runtime.files import (DataError, UserError, check_path, printable,    # noqa: E402
                                write_atomic, write_json)

HUB = "https://huggingface.co"
LOCAL = ("127.0.0.1", "::1", "localhost")
ATTEMPTS = 5
PAUSE = 1.0                                             # seconds; doubles with each attempt
TIMEOUT = 30                                            # seconds without a byte
MIN_RATE = 100_000                                      # bytes a second; a server that drips is ended
CHUNK = 1 << 20                                         # bytes
MAX_MEMBERS = 1000                                      # of a zip
MAX_BYTES = 10 ** 9                                     # of an unpacked zip
MAX_RATIO = 100                                         # unpacked to packed: text has 10, a bomb 1000
USE_COPY = "or use a copy that you have (data: --from, a model: --init FOLDER)"


def log(text):
    print(text, file=sys.stderr, flush=True)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---- download ----------------------------------------------------------------------------------------------
def request_for(url, headers, previous=None):
    """A GET request, to the hub with HF_TOKEN. Raises DataError unless the address is plain https."""
    parts = urllib.parse.urlsplit(url)
    local = parts.scheme == "http" and parts.hostname in LOCAL and (previous or url).startswith("http:")
    if "@" in parts.netloc or not (parts.scheme == "https" or local):
        host = printable(str(parts.hostname))
        raise DataError(f"an address at {host} is not plain https and is not followed; {USE_COPY}")
    request = urllib.request.Request(url, headers=headers)
    token = re.sub("[^!-~]", "", os.environ.get("HF_TOKEN", ""))    # else an error might quote it
    if token and url.startswith(HUB + "/"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


class Redirect(urllib.request.HTTPRedirectHandler):
    """Checks each hop like the first one, and takes no token along."""

    def redirect_request(self, request, fp, code, message, headers, url):
        return request_for(url, request.headers, previous=request.full_url)


class TimedReader(io.RawIOBase):
    """The bytes of a socket, until a deadline (of time.monotonic). Then it raises TimeoutError."""

    def __init__(self, raw, deadline):
        self.raw = raw
        self.deadline = deadline

    def readable(self):
        return True

    def readinto(self, buffer):
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"it sends less than {MIN_RATE // 1000} kB a second")
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


def make_opener(deadline):
    """An opener whose answers, head and body, end at the deadline; a socket's time-out ends silence only."""
    def timed_response(sock, *args, **kwargs):
        response = http.client.HTTPResponse(sock, *args, **kwargs)
        response.fp = io.BufferedReader(TimedReader(response.fp.detach(), deadline))
        return response

    class TimedHTTP(http.client.HTTPConnection):
        response_class = staticmethod(timed_response)

    class TimedHTTPS(http.client.HTTPSConnection):
        response_class = staticmethod(timed_response)

    class HTTPHandler(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(TimedHTTP, request)

    class HTTPSHandler(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(TimedHTTPS, request)

    return urllib.request.build_opener(Redirect, HTTPHandler, HTTPSHandler)


def receive(response, url, part, start, limit):
    """Append a response to `part`, or rewrite it where the server ignores the Range.

    Raises ConnectionError when bytes are missing, DataError for a web page and for more than `limit` bytes.
    """
    resumed = start > 0 and response.status == 206
    size = start if resumed else 0
    length = response.headers.get("Content-Length", "")
    total = size + int(length) if length.isdecimal() else None
    chunk = response.read1(CHUNK)
    html = not resumed and re.match(rb"\s*<(!doctype|html)", chunk[:64], re.I)
    if html or response.headers.get_content_type() == "text/html":
        raise DataError(f"{url} answers with a web page (a login? a proxy?), not data; {USE_COPY}")
    with open(part, "ab" if resumed else "wb") as f, tqdm(
            desc=part.stem, total=total, initial=size, unit="B", unit_scale=True, disable=None) as bar:
        while chunk:
            size += len(chunk)
            if max(size, total or 0) > limit:
                f.truncate(0)
                raise DataError(f"{url} is larger than the {limit} bytes expected; {USE_COPY}")
            f.write(chunk)
            bar.update(len(chunk))
            chunk = response.read1(CHUNK)
        f.flush()
        os.fsync(f.fileno())
    if total not in (None, size):
        raise ConnectionError(f"{size} of {total} bytes came")


def download(url, target, expected, limit):
    """Fetch `url` as the file `target` of sha256 `expected`. Raises DataError; `target` is then as it was."""
    part = target.with_name(target.name + ".part")
    problem = ""
    deadline = time.monotonic() + 2 * TIMEOUT + limit / MIN_RATE
    opener = make_opener(deadline)
    attempt = 0
    while attempt < ATTEMPTS and time.monotonic() < deadline:
        attempt += 1
        if attempt > 1:
            log(f"{url}: {problem}; attempt {attempt} of {ATTEMPTS}")
            time.sleep(PAUSE * 2 ** (attempt - 2))
        start = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "fetch.py"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with opener.open(request_for(url, headers), timeout=TIMEOUT) as response:
                receive(response, url, part, start, limit)
        except DataError:
            raise
        except urllib.error.HTTPError as e:
            e.close()
            problem = f"status {e.code}"
            if e.code in (408, 429) or e.code >= 500:
                continue
            if e.code != 416 or not start:              # 416: no bytes follow this part, so its hash decides
                gated = "accept the licence on its page and set HF_TOKEN, " if e.code in (401, 403) else ""
                raise DataError(f"{url} answers with {problem}; {gated}{USE_COPY}") from e
        except (OSError, http.client.HTTPException, ValueError) as e:   # ValueError: a malformed redirect
            problem = printable(str(getattr(e, "reason", e))) or type(e).__name__
            continue
        found = sha256(part)
        if found == expected:
            os.replace(part, target)
            return
        part.unlink()
        problem = f"its sha256 begins with {found[:12]}, that of the pinned file with {expected[:12]}"
        if not start:                                   # only a resumed part can mix two versions
            raise DataError(f"{url} is not the pinned file: {problem}; nothing was kept, {USE_COPY}")
    times = "once" if attempt == 1 else f"{attempt} times"
    raise DataError(f"{url} failed {times} ({problem}); the same command resumes, {USE_COPY}")


# ---- converters: paths of the files -> {split: rows, or a text} --------------------------------------------
def read_zip(path):
    """{name: bytes} of a zip whose members are all sound; nothing is extracted to disk.

    Raises DataError for a damaged zip, a bomb, a member without a name, a path that leads out, a link or
    device, and a name twice.
    """
    limit = min(MAX_BYTES, MAX_RATIO * path.stat().st_size)
    files = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS or sum(m.file_size for m in members) > limit:
                raise DataError(f"{path} unpacks to over {MAX_MEMBERS} members or {limit} bytes (a bomb?)")
            for m in members:
                name = m.filename.replace("\\", "/")
                mode = stat.S_IFMT(m.external_attr >> 16)       # 0: made on a system without modes
                outside = name.startswith("/") or ":" in name or ".." in name.split("/")
                regular = mode in (0, stat.S_IFREG, stat.S_IFDIR)
                if not name or outside or name in files or not regular:
                    raise DataError(f"{path}: member '{printable(name)}' has no name, leads out of it, is a "
                                    "link or a device, or is there twice; get another copy")
                files[name] = archive.read(m)
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError, LookupError,
            struct.error) as e:
        raise DataError(f"{path} cannot be read as a zip ({printable(str(e))}); get another copy") from e
    return files


def read_text(path):
    return path.read_bytes().decode()                   # UTF-8, line ends as they are


def read_csv(text):
    return csv.reader(io.StringIO(text, newline=""))


def split_by_hash(rows, key):
    """Rows with equal row[key] share a split, and a new row moves no other."""
    splits = {"train": [], "valid": [], "test": []}
    for row in rows:
        percent = int(hashlib.sha1(row[key].encode()).hexdigest(), 16) % 100
        split = "test" if percent < 20 else "valid" if percent < 30 else "train"
        splits[split].append(row)
    return splits


def split_in_order(rows):
    train = int(len(rows) * 0.85)
    test = train + int(len(rows) * 0.1)
    return {"train": rows[:train], "test": rows[train:test], "valid": rows[test:]}


def tinyshakespeare(path):
    return {"train": read_text(path)}


def sms_spam(path):
    pairs = [line.split("\t", 1) for line in read_text(path).rstrip("\n").split("\n")]
    return split_by_hash([{"text": text, "label": label} for label, text in pairs], "text")


def instruct(path):
    return split_in_order(json.loads(read_text(path)))


def instruct_pref(path):
    return split_in_order([{
        "prompt": "\n".join(filter(None, (row["instruction"], row["input"]))), "chosen": row["chosen"],
        "rejected": row["rejected"], "reference": row["output"]} for row in json.loads(read_text(path))])


def alpaca(path):
    return split_by_hash(json.loads(read_text(path)), "instruction")


def hh_rlhf(train, test):
    lines = {"train": gzip.decompress(train.read_bytes()), "test": gzip.decompress(test.read_bytes())}
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in lines.items()}


def e2e(path):
    """One row per text to train on; elsewhere one row per input, with all its texts to score against."""
    files = read_zip(path)
    splits = {}
    for split, name in (("train", "trainset"), ("valid", "devset"), ("test", "testset_w_refs")):
        _, *table = read_csv(files[f"e2e-dataset/{name}.csv"].decode())        # the columns are mr and ref
        pairs = [(mr.strip(), ref.strip()) for mr, ref in table]
        texts = {}
        for mr, ref in pairs:
            texts.setdefault(mr, []).append(ref)
        if split == "train":
            splits[split] = [{"input": mr, "output": ref} for mr, ref in pairs]
        else:
            splits[split] = [{"input": mr, "outputs": refs} for mr, refs in texts.items()]
    return splits


def e2e_ratings(path):
    """A group of five texts, known by its input, texts and systems, is rated by one or three people."""
    table = read_csv(read_text(path))
    header = next(table, [])
    column = {name: i for i, name in enumerate(header) if not name.startswith("_")}     # _: about a rater
    group_columns = ["mr", *(f"ref{i}" for i in range(1, 6)), *(f"sys{i}" for i in range(1, 6))]
    groups = {}
    for cells in table:
        group = tuple(cells[column[name]].strip() for name in group_columns)
        quality = [float(cells[column[f"quality{i}"]]) for i in range(1, 6)]
        groups.setdefault(group, []).append(quality)
    rows = []
    for (prompt, *texts), ratings in groups.items():
        for a, b in itertools.combinations(range(5), 2):
            votes = {a: sum(quality[a] > quality[b] for quality in ratings),
                     b: sum(quality[b] > quality[a] for quality in ratings)}
            if votes[a] != votes[b] and texts[a] != texts[b]:
                chosen, rejected = sorted(votes, key=votes.get, reverse=True)
                rows.append({"prompt": prompt, "chosen": texts[chosen], "rejected": texts[rejected],
                             "votes_for": votes[chosen], "votes_against": votes[rejected],
                             "raters": len(ratings)})
    return split_by_hash(rows, "prompt")


def wnut17(train, valid, test=None):
    splits = {}
    for split, path in {"train": train, "valid": valid, "test": test}.items():
        texts = [[]]
        for line in read_text(path).split("\n") if path else ():
            if line.strip():
                texts[-1].append(line.rstrip().split("\t"))
            else:
                texts.append([])                        # a blank line ends a text
        splits[split] = [{"tokens": [token for token, _ in text], "tags": [tag for _, tag in text]}
                         for text in texts if text]
    return {split: rows for split, rows in splits.items() if rows}


CONVERTERS = {"tinyshakespeare": tinyshakespeare, "sms_spam": sms_spam, "instruct": instruct,
              "instruct_pref": instruct_pref, "alpaca": alpaca, "hh-rlhf": hh_rlhf, "e2e": e2e,
              "e2e_ratings": e2e_ratings, "wnut17": wnut17}
OPTIONAL = {"emerging.test.annotated"}                  # a --from folder may lack it


# ---- fetch -------------------------------------------------------------------------------------------------
def local_copy(name, file, source, unverified):
    """The path of a --from copy, None for an optional file that is not there.

    Raises DataError for a missing file, and unless `unverified` for another sha256.
    """
    paths = [source / file.name, source / f"{name}__{file.name}"] if source.is_dir() else [source]
    path = next((path for path in paths if path.is_file()), None)
    if path is None and file.name in OPTIONAL:
        log(f"--from {source} has no {file.name}, so there is no test split; train.py then tests on valid")
        return None
    if path is None:
        raise DataError(f"--from {source}: there is no {file.name}; give that file, or a folder with it")
    found = sha256(path)
    if found != file.sha256:
        fault = f"its sha256 begins with {found[:12]}, that of the pinned {file.name} with {file.sha256[:12]}"
        if not unverified:
            raise DataError(f"{path}: {fault}; get another copy, or accept this one with --unverified")
        log(f"WARNING: {path} is NOT VERIFIED: {fault}; results on it may not compare with those of others")
    return path


def remote_copy(file, folder):
    """The path of a file in `folder`, downloaded unless it is there. Raises DataError."""
    path = folder / file.name
    if not path.exists() or sha256(path) != file.sha256:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise DataError(f"HF_HUB_OFFLINE is set, so {file.url} is not downloaded; unset it, {USE_COPY}")
        url = file.url
        if url.startswith(HUB + "/"):
            url = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/") + url.removeprefix(HUB)
        download(url, path, file.sha256, file.mb * 10 ** 6)
    log(f"{path}: sha256 verified")
    return path


def fetch_model(name, out):
    """See fetch. What is in the Hugging Face cache is used; unverified if not at the pinned revision."""
    repo, revision = cache.MODELS[name]
    cached = None if out else cache.find_model(name)
    if cached and cached.name != revision:
        log(f"{cached} holds revision {cached.name}, not {revision}; it is used as it is, not verified")
        return cached
    folder = out or cached or cache.model_cache(repo) / "snapshots" / revision
    folder.mkdir(parents=True, exist_ok=True)
    for file in cache.SOURCES[name]:
        remote_copy(file, folder)
    main = cache.model_cache(repo) / "refs" / "main"
    if not (out or cached or main.exists()):
        write_atomic(main, revision)                    # other tools find the model by name through it
    return folder


def fetch_data(name, out, source, unverified):
    """See fetch. A folder with a source.json is complete and left alone."""
    files = cache.SOURCES[name]
    folder = out or cache.data_folder(name)
    if (folder / cache.RECORD).exists():
        log(f"{folder} is complete; delete it to fetch {name} again")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    paths = [local_copy(name, file, source, unverified) if source else remote_copy(file, folder)
             for file in files]
    try:
        files_of = {}
        for split, rows in CONVERTERS[name](*paths).items():
            if isinstance(rows, str):
                files_of[f"{split}.txt"] = rows.encode()
            else:
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                files_of[f"{split}.jsonl"] = "".join(lines).encode()
        if not any(files_of.values()):
            raise ValueError("it holds no rows")
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, OSError, EOFError, zlib.error,
            csv.Error) as e:
        fault = printable(repr(e))
        raise DataError(f"{source or folder}: a file of {name} is damaged ({fault}); get another copy") from e
    for file_name, content in files_of.items():
        target = folder / file_name
        if target.exists() and target.read_bytes() != content:
            raise DataError(f"{target} is not a file of {name}; move it away, or choose another --out")
        write_atomic(target, content)
    came_from = {file.url: sha256(path) for file, path in zip(files, paths) if path}
    verified = all(came_from.get(file.url, file.sha256) == file.sha256 for file in files)
    for path in [] if source else paths:
        path.unlink()
    write_json(folder / cache.RECORD, {"about": files[0].about, "verified": verified, "sha256": came_from})
    return folder


def fetch(name, out=None, source=None, unverified=False):
    """Fetch a model or data set to the folder `out`, data also from the copy `source`; returns the folder.

    Raises UserError for a name or a combination that is not accepted, DataError for bad or missing files.
    """
    if name not in cache.SOURCES:
        raise UserError(f"{printable(name)} is not known here; known are {', '.join(cache.SOURCES)}; give the "
                        "folder of any other model to --init, any other data to --data")
    for path in (out, source):
        check_path(path or "")
    out = pathlib.Path(out) if out else None
    source = pathlib.Path(source) if source else None
    if name in cache.MODELS and (source or unverified):
        raise UserError(f"--from and --unverified are for data; give a folder with {name} to --init as it is")
    if unverified and not source:
        raise UserError("--unverified accepts a copy on this disk; name it with --from")
    if source and source.is_file() and len(cache.SOURCES[name]) > 1:
        names = ", ".join(file.name for file in cache.SOURCES[name])
        raise UserError(f"--from {source} is one file; {name} needs a folder with {names}")
    return fetch_model(name, out) if name in cache.MODELS else fetch_data(name, out, source, unverified)


def main(argv=None):
    parser = argparse.ArgumentParser("fetch.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="what to fetch, see --list")
    parser.add_argument("--out", metavar="DIR", help="default: the Hugging Face cache, or out/data/NAME")
    parser.add_argument("--from", dest="source", metavar="PATH", help="data: a file or folder to copy from")
    parser.add_argument("--unverified", action="store_true", help="accept a --from copy with another sha256")
    parser.add_argument("--list", action="store_true", help="names, largest sizes, content, licence")
    args = parser.parse_args(argv)
    if args.list:
        for name, files in cache.SOURCES.items():
            print(f"{name:22} {sum(file.mb for file in files):5} MB  {files[0].about}")
        return 0
    if not args.name:
        parser.error("give a name, or --list")
    try:
        folder = fetch(args.name, args.out, args.source, args.unverified)
    except UserError as e:
        log(f"fetch.py: {e}")
        return e.code
    except OSError as e:
        log(f"fetch.py: {e.filename} cannot be used ({e.strerror}); choose another folder with --out")
        return 2
    except KeyboardInterrupt:
        log("fetch.py: interrupted; the same command resumes")
        return 75
    flag = "--init" if args.name in cache.MODELS else "--data"
    print(f"{folder}\npython train.py {flag} {folder if args.out else args.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
