"""data/fetch.py and data/runtime/cache.py against a server on this machine that misbehaves on request.

Numbers in brackets are faults that must have an outcome: 71 wrong sha256, 72 short read, 73 web page instead
of data, 74 hostile archive members, 75 bombs, 76 offline.
"""
import contextlib
import csv
import email.message
import gzip
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import urllib.request
import urllib.response
import zipfile

import pytest

from data import fetch as F
from data.checkpoints import model_folders
from data.runtime import cache
from data.runtime.files import DataError, UserError
from data.text import formats

ROOT = pathlib.Path(__file__).resolve().parent.parent
BODY = bytes(range(256)) * 40                           # 10,240 bytes
SHA = hashlib.sha256(BODY).hexdigest()


# ---- a server that answers by script -----------------------------------------------------------------------
class Server:
    """`answers[path]` is a list of functions of the handler, used up one by one; the last one stays."""

    def __init__(self):
        self.seen, self.answers = [], {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.seen.append((self.path, dict(self.headers)))
                script = outer.answers.get(self.path, [status(404)])
                (script.pop(0) if len(script) > 1 else script[0])(self)

            def log_message(self, *_):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()

    def ranges(self):
        return [headers.get("Range") for _, headers in self.seen]


def status(code, **headers):
    def answer(h):
        h.send_response(code)
        for key, value in {"Content-Length": "0", **headers}.items():
            h.send_header(key, value)
        h.end_headers()
    return answer


def good(body=BODY, kind="application/octet-stream", honour=True, send=None, length=True, shift=0):
    """The body, from the Range on; `send` bytes of it only, or from `shift` bytes further on."""
    def answer(h):
        asked = re.fullmatch(r"bytes=(\d+)-", h.headers.get("Range") or "")
        start = int(asked[1]) if asked and honour else 0
        if start >= len(body):
            return status(416)(h)
        h.send_response(206 if asked and honour else 200)
        if asked and honour:
            h.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        h.send_header("Content-Type", kind)
        if length:
            h.send_header("Content-Length", str(len(body) - start))
        h.end_headers()
        with contextlib.suppress(ConnectionError):
            h.wfile.write((body[start + shift:] + bytes(shift))[:send])
    return answer


@pytest.fixture
def server(monkeypatch):
    for key in ("HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(F, "PAUSE", 0.0)
    monkeypatch.setattr(F, "TIMEOUT", 5)
    s = Server()
    yield s
    s.httpd.shutdown()
    s.httpd.server_close()


@pytest.fixture
def get(server, tmp_path):
    """get(*answers) downloads /f under this script; the target is tmp_path/f."""
    def run(*answers, sha=SHA, limit=len(BODY)):
        server.answers["/f"] = list(answers)
        F.download(f"{server.url}/f", tmp_path / "f", sha, limit)
        return (tmp_path / "f").read_bytes()
    return run


# ---- downloads ---------------------------------------------------------------------------------------------
def test_a_good_answer(get, server, tmp_path):
    assert get(good()) == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and len(server.seen) == 1
    assert server.seen[0][1]["Accept-Encoding"] == "identity"   # zipped, the sha256 would be another


def test_wrong_sha256_keeps_nothing_and_the_old_file(get, server, tmp_path):           # [71]
    (tmp_path / "f").write_bytes(b"old and precious")
    with pytest.raises(DataError, match="sha256 begins with .*nothing was kept"):
        get(good(BODY[::-1]))
    assert (tmp_path / "f").read_bytes() == b"old and precious"
    assert len(list(tmp_path.iterdir())) == 1 and len(server.seen) == 1     # and it is not asked for again


def test_a_cut_is_resumed_where_it_happened(get, server):                              # [72]
    assert get(good(send=3000), good(send=1000), good()) == BODY
    assert server.ranges() == [None, "bytes=3000-", "bytes=4000-"]


def test_always_cut_gives_up_and_the_next_command_goes_on(get, server, tmp_path):
    with pytest.raises(DataError, match="failed 5 times .*bytes came.*the same command resumes"):
        get(good(send=10))
    assert len(server.seen) == F.ATTEMPTS and not (tmp_path / "f").exists()
    assert (tmp_path / "f.part").stat().st_size == 50
    assert get(good()) == BODY and server.ranges()[-1] == "bytes=50-"


def test_a_cut_without_length_is_seen_by_the_hash(get, server):
    with pytest.raises(DataError, match="sha256"):
        get(good(send=3000, length=False))
    assert len(server.seen) == 1


def test_range_ignored_begins_anew(get, server):
    assert get(good(send=3000), good(honour=False)) == BODY
    assert len(server.seen) == 2


def test_another_range_than_asked_for(get, server):
    assert get(good(send=3000), good(shift=7), good()) == BODY
    assert server.ranges() == [None, "bytes=3000-", None]               # the hash shows it


def test_a_part_of_another_version_is_thrown_away(get, server, tmp_path):
    (tmp_path / "f.part").write_bytes(b"x" * 500)
    assert get(good()) == BODY
    assert server.ranges() == ["bytes=500-", None]


def test_a_part_that_is_too_long(get, server, tmp_path):
    (tmp_path / "f.part").write_bytes(BODY + b"more")
    assert get(good()) == BODY
    assert server.ranges() == [f"bytes={len(BODY) + 4}-", None]


def test_a_part_that_only_lacks_its_name(get, server, tmp_path):
    (tmp_path / "f.part").write_bytes(BODY)
    assert get(good()) == BODY and server.ranges() == [f"bytes={len(BODY)}-"]


@pytest.mark.parametrize("page", [good(b"<p>log in</p>", kind="text/html; charset=utf-8", honour=False),
                                  good(b"\n <!DOCTYPE html><title>proxy", honour=False),
                                  good(b"<HTML>", honour=False)])
def test_a_web_page_is_refused_and_the_part_survives(get, server, tmp_path, page):     # [73]
    with pytest.raises(DataError, match="web page .*not data"):
        get(page)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="web page"):
        get(good(send=3000), page)
    assert (tmp_path / "f.part").read_bytes() == BODY[:3000]
    assert get(good()) == BODY and len(server.seen) == 4


def test_larger_than_expected(get, server, tmp_path, monkeypatch):
    monkeypatch.setattr(F, "CHUNK", 1000)
    for answer in (good(), good(length=False), good(send=10)):              # as claimed, or as it comes
        with pytest.raises(DataError, match="larger than the 5000 bytes"):
            get(answer, limit=5000)
        assert not (tmp_path / "f").exists()
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) == 0
    assert len(server.seen) == 3


def test_statuses(get, server):
    assert get(status(503), status(429), status(500), good()) == BODY       # may pass
    for code, hint in ((404, "status 404"), (403, "HF_TOKEN"), (401, "licence"), (416, "status 416")):
        before = len(server.seen)
        with pytest.raises(DataError, match=hint):
            get(status(code))
        assert len(server.seen) == before + 1                               # will not
    before = len(server.seen)
    with pytest.raises(DataError, match="status 500"):
        get(status(500))
    assert len(server.seen) == before + F.ATTEMPTS


def test_nobody_listens(server, tmp_path):
    server.httpd.server_close()
    with pytest.raises(DataError, match="failed 5 times.*refused"):
        F.download(f"{server.url}/f", tmp_path / "f", SHA, 10)


def drip(h, head, body=b""):
    """Bytes one by one, for seconds, each well before the time-out of the socket."""
    with contextlib.suppress(ConnectionError):
        for byte in head + body * 1000:
            h.wfile.write(bytes([byte]))
            h.wfile.flush()
            time.sleep(0.02)


@pytest.mark.parametrize("head, body", [
    (b"HTTP/1.0 200 OK\r\nContent-Length: 10240\r\n\r\n", b"x"),                       # a body that drips
    (b"HTTP/1.0 200 OK\r\n", b"X-A: b\r\n")])                                            # a head that drips
def test_a_server_that_drips_is_ended(get, server, monkeypatch, head, body):
    monkeypatch.setattr(F, "TIMEOUT", 0.5)
    monkeypatch.setattr(F, "MIN_RATE", 20_000)                                           # 1 s, and 0.5 s for the size
    began = time.monotonic()
    with pytest.raises(DataError, match="failed once .it sends less than 20 kB a second.; the same command resumes"):
        get(lambda h: drip(h, head, body))
    assert 1.4 < time.monotonic() - began < 5


def test_a_slow_server_has_time_in_proportion_to_the_size(get, server, monkeypatch):
    monkeypatch.setattr(F, "TIMEOUT", 0.1)
    monkeypatch.setattr(F, "MIN_RATE", 5_000)                                            # 0.2 s, and 2 s for the size

    def slow(h):
        status(200, **{"Content-Length": str(len(BODY))})(h)
        for start in range(0, len(BODY), 1024):
            h.wfile.write(BODY[start:start + 1024])
            time.sleep(0.05)
    assert get(slow) == BODY


@pytest.mark.parametrize("line", [b"\x1b[2J\x00HTTP\r\n", b"HTTP/1.1 2\x1b[31m0 OK\r\n\r\n", b"\xff" * 4000 + b"\r\n"])
def test_bytes_of_a_server_in_a_message_are_escaped_and_cut(get, server, capsys, line):
    with pytest.raises(DataError) as e:
        get(lambda h: h.wfile.write(line))
    said = str(e.value) + capsys.readouterr().err
    assert "failed 5 times" in said and all(c.isprintable() or c == "\n" for c in said)
    assert max(map(len, said.splitlines())) < 400 and "\n" not in str(e.value)


# ---- redirects and the token -------------------------------------------------------------------------------
def test_redirects_are_followed_but_not_for_ever(get, server):
    server.answers["/a%20b"] = [good()]
    for code in (301, 302, 303, 307, 308):
        assert get(status(code, Location="/a b")) == BODY
    server.seen.clear()
    with pytest.raises(DataError, match="status 307"):
        get(status(307, Location="/f"))
    assert len(server.seen) < 15


def test_a_redirected_download_is_resumed(get, server):
    server.answers["/g"] = [good(send=3000), good()]
    assert get(status(302, Location="/g")) == BODY
    assert server.ranges() == [None, None, "bytes=3000-", "bytes=3000-"]


@pytest.mark.parametrize("to, sentence", [
    ("http://192.0.2.1/f", "not plain https"), ("http://example.com/f", "not plain https"),
    ("https://user:secret@127.0.0.1/f", "not plain https"), ("ftp://127.0.0.1/f", "not plain https"),
    ("file:///etc/passwd", "status 302"), ("http://[::1", "failed 5 times")])
def test_redirects_lead_to_https_only(get, server, to, sentence):
    with pytest.raises(DataError, match=sentence) as e:
        get(status(302, Location=to))
    assert "secret" not in str(e.value) and all(path == "/f" for path, _ in server.seen)


@pytest.fixture
def web(monkeypatch):
    """A web of https pages: {url: location or bytes}; records (url, Authorization)."""
    seen, pages = [], {}

    class Pages(urllib.request.HTTPSHandler):
        def https_open(self, request):
            seen.append((request.full_url, request.get_header("Authorization")))
            page, headers = pages[request.full_url], email.message.Message()
            if isinstance(page, str):
                headers["Location"] = page
            headers["Content-Type"] = "application/octet-stream"
            body = io.BytesIO(b"" if isinstance(page, str) else page)
            code = 302 if isinstance(page, str) else 200
            response = urllib.response.addinfourl(body, headers, request.full_url, code)
            response.msg = ""
            return response
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), F.Redirect, Pages)
    monkeypatch.setattr(F, "make_opener", lambda deadline: opener)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return seen, pages


def test_the_token_stays_with_the_hub(web, tmp_path):
    seen, pages = web
    hub, moved = "https://huggingface.co/m/f", "https://huggingface.co/n/f"
    cdn = "https://cdn.example/f?signature=1"
    pages.update({hub: "/n/f", moved: cdn, cdn: BODY})
    F.download(hub, tmp_path / "f", SHA, len(BODY))
    assert seen == [(hub, "Bearer hf_secret"), (moved, "Bearer hf_secret"), (cdn, None)]


@pytest.mark.parametrize("url", [
    "https://huggingface.co.evil.example/f", "https://evil.example/huggingface.co/f",
    "https://mirror.example/https://huggingface.co/f", "https://huggingface.co:444/f",
    "https://sub.huggingface.co/f"])
def test_lookalikes_get_no_token(web, tmp_path, url):
    seen, pages = web
    pages[url] = BODY
    F.download(url, tmp_path / "f", SHA, len(BODY))
    assert seen == [(url, None)]


@pytest.mark.parametrize("url", ["http://huggingface.co/f", "https://huggingface.co@evil.example/f"])
def test_unsafe_addresses_are_not_opened(web, tmp_path, url):
    with pytest.raises(DataError, match="not plain https"):
        F.download(url, tmp_path / "f", SHA, 10)
    assert not web[0]


def test_https_is_not_downgraded(web, tmp_path):
    seen, pages = web
    pages["https://huggingface.co/f"] = "http://127.0.0.1:1/f"              # this machine, but from outside
    with pytest.raises(DataError, match="not plain https"):
        F.download("https://huggingface.co/f", tmp_path / "f", SHA, 10)
    assert len(seen) == 1


def test_a_token_with_a_line_end_breaks_no_header(web, monkeypatch, tmp_path):
    seen, pages = web
    monkeypatch.setenv("HF_TOKEN", " hf_sec\r\nret\n")
    pages["https://huggingface.co/f"] = BODY
    F.download("https://huggingface.co/f", tmp_path / "f", SHA, len(BODY))
    assert seen == [("https://huggingface.co/f", "Bearer hf_secret")]


# ---- models ------------------------------------------------------------------------------------------------
REVISION = "a" * 40
MODEL = {"config.json": b"{}", "tokenizer.json": b"[1]", "model.safetensors": BODY}


def pinned(bodies, base):
    """Files at the address `base`, with the sha256 of these bodies."""
    return [cache.File("about it", 1, hashlib.sha256(body).hexdigest(), f"{base}/{name}")
            for name, body in bodies.items()]


@pytest.fixture
def tiny(server, monkeypatch, tmp_path):
    """A model `tiny` on a mirror; the cache is in tmp_path/home."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setitem(cache.MODELS, "tiny", ("org/tiny", REVISION))
    monkeypatch.setitem(cache.SOURCES, "tiny", pinned(MODEL, f"{F.HUB}/org/tiny/resolve/{REVISION}"))
    for name, body in MODEL.items():
        server.answers[f"/org/tiny/resolve/{REVISION}/{name}"] = [good(body)]
    return tmp_path / "home" / "hub" / "models--org--tiny"


def test_a_model_goes_into_the_cache_and_is_found_there(tiny, server, capsys):
    assert cache.find_model("tiny") is cache.find_model("org/tiny") is None
    with pytest.raises(DataError, match="run python data/fetch.py tiny$"):
        model_folders.find("tiny")
    assert F.main(["tiny"]) == 0
    folder = tiny / "snapshots" / REVISION
    out, err = capsys.readouterr()
    assert out == f"{folder}\npython train.py --init tiny\n" and err.count("sha256 verified") == 3
    assert cache.find_model("tiny") == cache.find_model("org/tiny") == model_folders.find("tiny") == folder
    assert (tiny / "refs" / "main").read_text() == REVISION
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == MODEL
    assert len(server.seen) == 3 and not any("Authorization" in headers for _, headers in server.seen)
    assert F.main(["tiny"]) == 0 and len(server.seen) == 3              # all there: no request


def test_a_damaged_file_is_replaced(tiny, server, tmp_path, capsys):
    assert F.main(["tiny", "--out", str(tmp_path / "m")]) == 0 and not tiny.exists()
    assert capsys.readouterr().out.endswith(f"--init {tmp_path / 'm'}\n")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"broken")
    F.fetch("tiny", tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == BODY and len(server.seen) == 4


def test_what_other_tools_cached_is_used(tiny, server, monkeypatch, tmp_path, capsys):
    def snapshot(base, revision, *names):
        (base / "snapshots" / revision).mkdir(parents=True)
        for name in names:
            (base / "snapshots" / revision / name).write_bytes(b"{}")
        return base / "snapshots" / revision
    snapshot(tiny, "b" * 40, "config.json", "pytorch_model.bin")            # pickles are never read
    snapshot(tiny, "0" * 40, "model.safetensors")                           # half a model
    assert cache.find_model("tiny") is None
    c = snapshot(tiny, "c" * 40, "config.json", "model.safetensors.index.json")
    assert cache.find_model("tiny") == c
    d = snapshot(tiny, "d" * 40, "config.json", "model.safetensors")
    (tiny / "refs").mkdir()
    (tiny / "refs" / "main").write_text("d" * 40 + "\n")
    assert cache.find_model("tiny") == cache.find_model("org/tiny") == d    # what the ref says
    assert F.fetch("tiny") == d and not server.seen
    assert "not verified" in capsys.readouterr().err
    assert F.fetch("tiny", tmp_path / "m") == tmp_path / "m" and len(server.seen) == 3      # --out means it
    a = snapshot(tiny, REVISION, "config.json", "model.safetensors")
    assert cache.find_model("tiny") == a and cache.find_model("org/tiny") == d      # the pinned commit first
    assert F.fetch("tiny") == a and (a / "model.safetensors").read_bytes() == BODY          # and is checked
    assert (tiny / "refs" / "main").read_text() == "d" * 40 + "\n"
    (tiny / "refs" / "main").write_text("../../../../etc")
    assert cache.find_model("org/tiny") == a
    old = snapshot(tiny.parent / "models--tiny", REVISION, "config.json", "model.safetensors")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert cache.find_model("tiny") is None and cache.find_model("../..") is None
    monkeypatch.setenv("HF_HUB_CACHE", str(tiny.parent))
    monkeypatch.setitem(cache.MODELS, "tiny", ("org/other", REVISION))
    assert cache.find_model("tiny") == old == F.fetch("tiny")


def test_only_the_hub_has_a_mirror(tiny, monkeypatch, tmp_path):
    urls = []
    monkeypatch.setattr(F, "download", lambda url, target, *_: (urls.append(url), target.write_bytes(b"")))
    for endpoint in ("https://mirror.example/hub/", "https://mirror.example/hub", ""):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        F.fetch("tiny", tmp_path / f"m{len(urls)}")
    end = f"/org/tiny/resolve/{REVISION}/config.json"
    assert urls[::3] == [f"https://mirror.example/hub{end}"] * 2 + [f"{F.HUB}{end}"]
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    with pytest.raises(DataError, match="damaged"):
        F.fetch("alpaca", tmp_path / "a")
    assert urls[-1] == cache.SOURCES["alpaca"][0].url


def test_offline(tiny, server, monkeypatch, tmp_path, capsys):                         # [76]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert F.main(["tiny"]) == 65
    err = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in err and "--init FOLDER" in err and not server.seen
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert F.main(["tiny"]) == 0 and len(server.seen) == 3
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert F.main(["tiny"]) == 0                                            # there: offline does not matter


# ---- data sets ---------------------------------------------------------------------------------------------
@pytest.fixture
def here(server, monkeypatch, tmp_path):
    """Work in a folder of its own, where out/data is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def given(monkeypatch, tmp_path):
    """given(name, bytes of each file) pins a data set to these and returns a folder with them for --from."""
    def run(name, *bodies):
        folder = tmp_path / "given"
        folder.mkdir(exist_ok=True)
        files = [file._replace(sha256=hashlib.sha256(body).hexdigest())
                 for file, body in zip(cache.SOURCES[name], bodies)]
        for file, body in zip(files, bodies):
            (folder / f"{name}__{file.name}").write_bytes(body)
        monkeypatch.setitem(cache.SOURCES, name, files)
        return folder
    return run


def rows_of(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_bytes().decode().split("\n")[:-1]]


SMS = "".join(f"{'spam' if i % 4 == 0 else 'ham'}\tmessage {i // 2}\u0085 of £{i // 2}\n"
              for i in range(200)).encode()


def test_a_data_set_from_the_network(here, server, monkeypatch, capsys):
    monkeypatch.setitem(cache.SOURCES, "sms_spam", pinned({"SMSSpamCollection": SMS}, server.url))
    server.answers["/SMSSpamCollection"] = [good(SMS, send=100), good(SMS)]
    for load in (formats.load, formats.load_splits):
        with pytest.raises(DataError, match="not fetched yet; run python data/fetch.py sms_spam"):
            load("sms_spam")
    assert F.main(["sms_spam"]) == 0
    assert capsys.readouterr().out == "out/data/sms_spam\npython train.py --data sms_spam\n"
    folder = here / "out" / "data" / "sms_spam"
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["source.json", "test.jsonl", "train.jsonl", "valid.jsonl"]     # the file itself is gone
    record = json.loads((folder / "source.json").read_text())
    came_from = {f"{server.url}/SMSSpamCollection": hashlib.sha256(SMS).hexdigest()}
    assert record["verified"] is True and record["sha256"] == came_from
    assert cache.find_data("sms_spam") == pathlib.Path("out/data/sms_spam")
    data = formats.load_splits("sms_spam")
    assert sum(len(part.rows) for part in data.values()) == 200 and data["train"].row_type == "label"
    assert len(server.seen) == 2
    (folder / "train.jsonl").write_text("edited")
    assert F.main(["sms_spam"]) == 0 and len(server.seen) == 2                      # complete: left alone
    assert (folder / "train.jsonl").read_text() == "edited"
    for name in ("", ".", "..", "../data/sms_spam", "sms_spam/", "none"):
        assert cache.find_data(name) is None


def test_a_path_comes_before_a_fetched_name(here, given):
    F.fetch("sms_spam", source=given("sms_spam", SMS))
    (here / "sms_spam").mkdir()
    (here / "sms_spam" / "train.jsonl").write_text('{"text": "mine", "label": "a"}\n')
    assert formats.load("sms_spam").rows[0]["text"] == "mine"


def test_an_interrupted_data_set_goes_on(here, given, monkeypatch):
    source, write = given("sms_spam", SMS), F.write_json
    monkeypatch.setattr(F, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert F.main(["sms_spam", "--from", str(source)]) == 75
    assert cache.find_data("sms_spam") is None
    monkeypatch.setattr(F, "write_json", write)
    assert F.main(["sms_spam", "--from", str(source)]) == 0 and cache.find_data("sms_spam")


def test_files_of_others_are_not_overwritten(here, given):
    (here / "mine").mkdir()
    (here / "mine" / "valid.jsonl").write_text("precious")
    with pytest.raises(DataError, match="valid.jsonl is not a file of sms_spam"):
        F.fetch("sms_spam", "mine", given("sms_spam", SMS))
    assert (here / "mine" / "valid.jsonl").read_text() == "precious"


def test_from_is_checked_like_a_download(here, given, capsys):
    source = given("sms_spam", SMS)
    for path in (here / "none", here):
        assert F.main(["sms_spam", "--from", str(path)]) == 65
        assert "there is no SMSSpamCollection; give that file" in capsys.readouterr().err
    (source / "sms_spam__SMSSpamCollection").rename(source / "any name")
    assert F.main(["sms_spam", "--from", str(source / "any name"), "--out", "one"]) == 0  # any file
    (source / "any name").rename(source / "SMSSpamCollection")
    assert F.main(["sms_spam", "--from", str(source), "--out", "two"]) == 0               # no prefix
    assert (source / "SMSSpamCollection").exists() and not (here / "two" / "SMSSpamCollection").exists()
    (source / "SMSSpamCollection").write_bytes(SMS + b"ham\tadded\n")
    capsys.readouterr()
    assert F.main(["sms_spam", "--from", str(source)]) == 65
    assert re.search("sha256 begins with .* accept this one with --unverified\n$", capsys.readouterr().err)
    assert not (here / "out" / "data" / "sms_spam" / "train.jsonl").exists()
    assert F.main(["sms_spam", "--from", str(source), "--unverified"]) == 0
    assert "NOT VERIFIED" in capsys.readouterr().err
    assert json.loads((here / "out/data/sms_spam/source.json").read_text())["verified"] is False
    assert F.main(["sms_spam", "--out", "three", "--unverified"]) == 2
    assert F.main(["gpt2", "--from", str(source)]) == 2 and F.main(["gpt2", "--unverified"]) == 2
    assert F.main(["wnut17", "--from", str(source / "SMSSpamCollection")]) == 2
    err = capsys.readouterr().err
    assert "is one file; wnut17 needs a folder with wnut17train.conll" in err and "--init as it is" in err


def test_sms_spam(here, given):
    folder = F.fetch("sms_spam", source=given("sms_spam", SMS))
    parts = [{row["text"] for row in rows_of(folder, split)} for split in ("train", "valid", "test")]
    assert sum(map(len, parts)) == 100 and all(parts)                       # both copies are in one split
    assert "message 7\u0085 of £7" in set().union(*parts)                   # \u0085 ends no line here


def test_alpaca(here, given):
    rows = [{"instruction": f"do {i // 2}", "input": "", "output": str(i)} for i in range(100)]
    folder = F.fetch("alpaca", source=given("alpaca", json.dumps(rows).encode()))
    data = formats.load_splits("alpaca")
    assert sorted(len(part.rows) for part in data.values()) == sorted(
        len(rows_of(folder, split)) for split in data) and data["train"].format == "Alpaca"
    assert formats.leaks(data["train"].rows, data["test"].rows) == 0


def test_hh(here, given):
    asked = "\n\nHuman: Hi\n\nAssistant:"
    line = json.dumps({"chosen": f"{asked} Hello.", "rejected": f"{asked} No."}).encode() + b"\n"
    F.fetch("hh-rlhf", source=given("hh-rlhf", gzip.compress(line * 3), gzip.compress(line * 2)))
    data = formats.load("hh-rlhf", "test")
    assert data.row_type == "pairs" and len(data.rows) == 2 and data.rows[0]["rejected"].strip() == "No."


def as_csv(rows):
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\r\n").writerows(rows)
    return out.getvalue().encode()


def ratings(names, **cells):
    return [cells.get(name, "SECRET" if name.startswith("_") else "") for name in names]


def test_e2e_ratings_reads_no_column_about_a_rater(here, server, monkeypatch):
    names = ["_ip", "_worker_id", "quality1", "quality2", "quality3", "quality4", "quality5", "mr",
             *(f"{kind}{i}" for kind in ("ref", "sys") for i in range(1, 6)), "_country"]
    texts = {"ref1": "A ", "ref2": "B", "ref3": "C", "ref4": "C", "ref5": "E"}
    table = [names]
    for scores in ((5, 3, 1, 2, 1), (5, 3, 1, 2, 2), (2, 3, 1, 2, 1)):
        quality = {f"quality{i}": str(score) for i, score in enumerate(scores, 1)}
        table.append(ratings(names, mr="name[X]", **texts, **quality))
    body = as_csv(table)
    monkeypatch.setitem(cache.SOURCES, "e2e_ratings", pinned({"quality.csv": body}, server.url))
    server.answers["/quality.csv"] = [good(body)]
    folder = F.fetch("e2e_ratings")
    assert not any(b"SECRET" in path.read_bytes() for path in folder.iterdir())
    rows = [row for split in ("train", "valid", "test") for row in rows_of(folder, split)]
    votes = [(row["chosen"] + row["rejected"], row["votes_for"], row["votes_against"]) for row in rows]
    assert votes == [("AB", 2, 1), ("AC", 3, 0), ("AC", 2, 0), ("AE", 3, 0), ("BC", 3, 0), ("BC", 3, 0),
                     ("BE", 3, 0), ("EC", 1, 0), ("CE", 2, 0)]         # no tie, and no C against C
    assert {row["raters"] for row in rows} == {3} and {row["prompt"] for row in rows} == {"name[X]"}


def test_wnut17_with_and_without_its_test_file(here, given, capsys):
    text = "I\tO\nsaw\tO\nParis\tB-location\n\n \t\n\nNo\tO\n".encode()
    source = given("wnut17", text, text[:4], text)
    folder = F.fetch("wnut17", source=source)
    assert rows_of(folder, "test") == [{"tokens": ["I", "saw", "Paris"], "tags": ["O", "O", "B-location"]},
                                       {"tokens": ["No"], "tags": ["O"]}]
    (source / "wnut17__emerging.test.annotated").unlink()
    F.fetch("wnut17", "less", source)
    assert "there is no test split" in capsys.readouterr().err
    assert formats.load("less", "test").source.endswith("valid.jsonl, because there is no test file")
    assert json.loads(pathlib.Path("less/source.json").read_text())["verified"] is True
    (source / "wnut17__emerging.dev.conll").unlink()
    with pytest.raises(DataError, match="no emerging.dev.conll"):
        F.fetch("wnut17", "none", source)


def make_zip(path, *members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, body, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, compression
            z.writestr(info, body)
    return path


def e2e_zip(path, train, valid, test):
    return make_zip(path, ("e2e-dataset/", b"", 0o040755), *(
        (f"e2e-dataset/{name}.csv", as_csv([("mr", "ref"), *rows]), 0o100644)
        for name, rows in (("trainset", train), ("devset", valid), ("testset_w_refs", test)))).read_bytes()


def test_e2e(here, given, tmp_path):
    pairs = [("name[A], near[B]", 'It is "A",\r\n near B. '), ("name[A], near[B]", "A, B"), ("name[C] ", "C")]
    folder = F.fetch("e2e", source=given("e2e", e2e_zip(tmp_path / "z", pairs, pairs, pairs[:1])))
    train = rows_of(folder, "train")
    assert train[0] == {"input": "name[A], near[B]", "output": 'It is "A",\r\n near B.'} and len(train) == 3
    assert train[2]["input"] == "name[C]" and len(rows_of(folder, "test")) == 1
    assert formats.load("e2e", "train").row_type == formats.load("e2e", "test").row_type == "chat"
    assert formats.load("e2e", "valid").rows[0]["references"] == ['It is "A",\r\n near B.', "A, B"]


def test_damaged_contents(here, given, tmp_path):
    for name, *bodies in (("hh-rlhf", b"?", b"?"), ("hh-rlhf", gzip.compress(b"[1}\n"), gzip.compress(b"")),
                          ("sms_spam", b"ham x\n"), ("sms_spam", b"ham\t\xff\n"), ("alpaca", b"{"),
                          ("alpaca", b"[" * 100_000), ("alpaca", b"[1]"), ("alpaca", b'[{"instruction": 1}]'),
                          ("alpaca", b'[{"instruction": "a", "output": "\\ud800"}]'),
                          ("instruct_pref", b'[{"input": ""}]'),
                          ("e2e", make_zip(tmp_path / "z", ("x", b"", 0)).read_bytes()),
                          ("e2e_ratings", b"a,b\n1,2\n"), ("e2e_ratings", b""), ("alpaca", b"[]"),
                          ("wnut17", b"word\n", b"", b"")):
        with pytest.raises(DataError, match="a file of .* is damaged .*; get another copy$"):
            F.fetch(name, "out", given(name, *bodies))
        assert not list((here / "out").iterdir())


PREPARED = {"sms_spam": ("train", "valid", "test"), "instruct": ("train", "valid", "test"),
            "instruct_pref": ("train", "valid", "test"), "e2e": ("train", "valid"),
            "e2e_ratings": ("train", "valid"), "wnut17": ("train", "valid")}
COUNTS = {"sms_spam": (3870, 595, 1109), "instruct": (935, 55, 110), "instruct_pref": (935, 55, 110),
          "e2e": (42061, 547, 630), "e2e_ratings": (6098, 905, 1667), "wnut17": (3394, 1009, 0)}
KINDS = {"sms_spam": "label", "instruct": "chat", "instruct_pref": "pairs", "e2e": "chat",
         "e2e_ratings": "pairs", "wnut17": "tags"}


@pytest.mark.parametrize("name", COUNTS)
def test_real_files_give_the_known_splits(here, assets, name):
    if not (assets / "raw").is_dir():
        pytest.skip("ASSETS has no folder raw")
    folder = F.fetch(name, source=assets / "raw", unverified=name == "e2e_ratings")   # raters blanked
    splits = [folder / f"{split}.jsonl" for split in ("train", "valid", "test")]
    assert tuple(p.read_bytes().count(b"\n") if p.exists() else 0 for p in splits) == COUNTS[name]
    for split in PREPARED[name]:
        assert (folder / f"{split}.jsonl").read_bytes() == (assets / name / f"{split}.jsonl").read_bytes()
    assert formats.load(name, "test").row_type == KINDS[name]


def test_the_real_tinyshakespeare(here, assets):
    folder = F.fetch("tinyshakespeare", source=assets / "tinyshakespeare")
    text = (assets / "tinyshakespeare" / "input.txt").read_bytes()
    assert (folder / "train.txt").read_bytes() == text
    train, valid = (formats.load("tinyshakespeare", split).rows[0]["text"] for split in ("train", "valid"))
    assert (train + valid).encode() == text and round(len(train) / len(text), 2) == 0.9


# ---- zip ---------------------------------------------------------------------------------------------------
def test_a_good_zip(tmp_path):
    text = bytes(range(256))
    make_zip(tmp_path / "a", ("d/", b"", 0o040755), ("d/x.txt", text, 0o100644), ("y.txt", b"", 0))
    files = F.read_zip(tmp_path / "a")
    assert files["d/x.txt"] == text and files["y.txt"] == b""
    assert [p.name for p in tmp_path.iterdir()] == ["a"]                    # nothing is extracted to disk


@pytest.mark.parametrize("name, mode", [
    ("../x", 0), ("d/../../x", 0), ("/tmp/x", 0), ("..\\x", 0), ("\\x", 0), ("C:x", 0), ("d/..", 0),
    ("x", 0o120777), ("x", 0o020666), ("x", 0o010644), ("good", 0), ("", 0)])
def test_hostile_members(tmp_path, name, mode):                                        # [74]
    with pytest.warns(UserWarning) if name == "good" else contextlib.nullcontext():     # there twice
        make_zip(tmp_path / "a", ("good", b"1", 0), (name, b"2", mode))
    with pytest.raises(DataError, match="leads out of it, is a link or a device, or is there twice; get"):
        F.read_zip(tmp_path / "a")


def test_names_of_members_that_are_no_text(tmp_path):
    whole = make_zip(tmp_path / "a", ("é", b"1", 0)).read_bytes()
    assert F.read_zip(tmp_path / "a") == {"é": b"1"}
    (tmp_path / "a").write_bytes(whole.replace("é".encode(), b"\xff\xff"))
    with pytest.raises(DataError, match="cannot be read as a zip .*codec can't decode"):
        F.read_zip(tmp_path / "a")


@pytest.mark.parametrize("path, sentence", [
    ("a\0b", r"the path a\\x00b holds the character NUL"), ("\udcff", r"\\udcff is no path in UTF-8"),
    ("a" * 300, "has a name of 300 bytes, over 255")])
def test_paths_that_no_file_can_have(here, path, sentence):
    for flags in ({"out": path}, {"source": path}):
        with pytest.raises(DataError, match=sentence):
            F.fetch("alpaca", **flags)


def test_bombs(tmp_path, monkeypatch):                                                 # [75]
    monkeypatch.setattr(zipfile.ZipFile, "read", None)                      # seen before anything is unpacked
    for members in ([("zeros", bytes(10 ** 6), 0)], [(str(i), b"", 0) for i in range(F.MAX_MEMBERS + 1)]):
        with pytest.raises(DataError, match="bomb"):
            F.read_zip(make_zip(tmp_path / "a", *members))
    monkeypatch.setattr(F, "MAX_BYTES", 100)
    with pytest.raises(DataError, match="100 bytes"):
        F.read_zip(make_zip(tmp_path / "a", ("x", os.urandom(101), 0)))


def test_a_zip_that_lies_about_its_size(tmp_path):                                     # [75]
    body = make_zip(tmp_path / "a", ("x", bytes(10 ** 6), 0)).read_bytes()
    (tmp_path / "a").write_bytes(body.replace((10 ** 6).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(DataError, match="cannot be read as a zip"):
        F.read_zip(tmp_path / "a")


def test_broken_zips(tmp_path):
    whole = make_zip(tmp_path / "a", ("x", os.urandom(9000), 0)).read_bytes()
    flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    for bad in (b"", b"not an archive", whole[:4000], flipped):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(DataError, match="cannot be read as a zip"):
            F.read_zip(tmp_path / "bad")


# ---- the table and the command -----------------------------------------------------------------------------
def test_the_table_is_sane():
    assert set(F.CONVERTERS) == set(cache.DATASETS) and len(cache.MODELS) == 7
    for name, files in cache.SOURCES.items():
        assert re.fullmatch(r"[a-z0-9_-]+", name) and len({file.about for file in files}) == 1
        assert len({file.name for file in files}) == len(files)
        for file in files:
            assert re.fullmatch(r"https://(huggingface\.co|raw\.githubusercontent\.com)/\S+", file.url)
            assert re.search("/[0-9a-f]{40}/", file.url) and re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert re.fullmatch(r"[\w.-]+", file.name) and file.name[0] != "." and file.mb > 0
    for name, (repo, revision) in cache.MODELS.items():
        weights = [file for file in cache.SOURCES[name] if file.name == "model.safetensors"]
        assert f"/{repo}/resolve/{revision}/" in weights[0].url


def test_the_table_agrees_with_the_sources_of_the_assets(assets):
    if not (assets / "raw" / "sources.tsv").is_file():
        pytest.skip("ASSETS has no raw/sources.tsv")
    lines = (assets / "raw" / "sources.tsv").read_text().splitlines()[1:]
    known = {file.url: file for files in cache.SOURCES.values() for file in files}
    for _, repo, commit, path, size, sha256 in (line.split("\t") for line in lines):
        file = known[f"https://raw.githubusercontent.com/{repo}/{commit}/{path}"]
        assert file.sha256 == sha256 and int(size) <= file.mb * 10 ** 6


def test_it_runs_as_a_script_from_anywhere(tmp_path):
    run = subprocess.run([sys.executable, str(ROOT / "data" / "fetch.py"), "gtp2"], cwd=tmp_path, text=True,
                         capture_output=True)
    assert run.returncode == 2 and not run.stdout and run.stderr.count("\n") == 1
    assert run.stderr.startswith("fetch.py: gtp2 is not known here; known are gpt2, ")


def test_list_and_exit_codes(monkeypatch, tmp_path, capsys):
    assert F.main(["--list"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == list(cache.SOURCES) and not err
    for argv in ([], ["gpt2", "--lis"], ["gpt2", "--frm", "x"]):
        with pytest.raises(SystemExit) as e:
            F.main(argv)
        assert e.value.code == 2
    (tmp_path / "taken").write_text("a file")
    assert F.main(["alpaca", "--out", str(tmp_path / "taken")]) == 2
    assert "taken cannot be used" in capsys.readouterr().err
    with pytest.raises(UserError, match="not known"):
        F.fetch("none")
