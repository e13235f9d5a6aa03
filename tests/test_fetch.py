"""data/fetch.py, download.py, sources.py against a server on this machine that misbehaves on request.

Numbers in brackets are faults that must have an outcome: 71 wrong sha256, 72 short read, 73 web page instead
of data, 74 hostile archive members, 75 bombs, 76 offline.
"""
import contextlib
import csv
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
import tarfile
import threading
import urllib.error
import zipfile

import pytest

from data import download as D
from data import fetch as F
from data.text import formats
from data import sources as S
from data.runtime.files import DataError, UserError

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
    """The body, from the Range on; `send` bytes of it only, `shift` lies about where it starts."""
    def answer(h):
        asked = re.fullmatch(r"bytes=(\d+)-", h.headers.get("Range") or "")
        start = int(asked[1]) if asked and honour else 0
        if start >= len(body):
            return status(416)(h)
        h.send_response(206 if asked and honour else 200)
        if asked and honour:
            h.send_header("Content-Range", f"bytes {start + shift}-{len(body) - 1}/{len(body)}")
        h.send_header("Content-Type", kind)
        if length:
            h.send_header("Content-Length", str(len(body) - start))
        h.end_headers()
        with contextlib.suppress(ConnectionError):
            h.wfile.write(body[start:][:send])
    return answer


@pytest.fixture
def server(monkeypatch):
    for key in ("HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(D, "PAUSE", 0.0)
    monkeypatch.setattr(D, "TIMEOUT", 5)
    s = Server()
    yield s
    s.httpd.shutdown()
    s.httpd.server_close()


@pytest.fixture
def get(server, tmp_path):
    """get(*answers) downloads /f under this script; the target is tmp_path/f."""
    def run(*answers, sha=SHA, limit=len(BODY)):
        server.answers["/f"] = list(answers)
        D.download(f"{server.url}/f", tmp_path / "f", sha, limit)
        return (tmp_path / "f").read_bytes()
    return run


# ---- downloads ---------------------------------------------------------------------------------------------
def test_a_good_answer(get, server, tmp_path):
    assert get(good()) == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and len(server.seen) == 1
    assert server.seen[0][1]["Accept-Encoding"] == "identity"   # zipped, the sha256 would be another


def test_wrong_sha256_keeps_nothing_and_the_old_file(get, server, tmp_path):           # [71]
    (tmp_path / "f").write_bytes(b"old and precious")
    with pytest.raises(DataError, match="sha256 begins .*nothing was kept"):
        get(good(BODY[::-1]))
    assert (tmp_path / "f").read_bytes() == b"old and precious"
    assert len(list(tmp_path.iterdir())) == 1 and len(server.seen) == 1     # and it is not asked for again


def test_a_cut_is_resumed_where_it_happened(get, server):                              # [72]
    assert get(good(send=3000), good(send=1000), good()) == BODY
    assert server.ranges() == [None, "bytes=3000-", "bytes=4000-"]


def test_always_cut_gives_up_and_the_next_command_goes_on(get, server, tmp_path):
    with pytest.raises(DataError, match="did not come in 5 attempts.*bytes came.*--from"):
        get(good(send=10))
    assert len(server.seen) == D.ATTEMPTS and not (tmp_path / "f").exists()
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
    assert server.ranges() == [None, "bytes=3000-", None]


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
    assert get(status(500)) == BODY and not server.seen


@pytest.mark.parametrize("page", [good(b"<p>log in</p>", kind="text/html; charset=utf-8", honour=False),
                                  good(b"\n <!DOCTYPE html><title>proxy", honour=False),
                                  good(b"<HTML>", honour=False)])
def test_a_web_page_is_refused_and_the_part_survives(get, server, tmp_path, page):     # [73]
    with pytest.raises(DataError, match="web page instead of data"):
        get(page)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="web page"):
        get(good(send=3000), page)
    assert (tmp_path / "f.part").read_bytes() == BODY[:3000]
    assert get(good()) == BODY and len(server.seen) == 4


def test_larger_than_expected(get, server, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "CHUNK", 1000)
    for answer in (good(), good(length=False), good(send=10)):              # as claimed, or as it comes
        with pytest.raises(DataError, match="larger than the 5000 bytes"):
            get(answer, limit=5000)
        assert not (tmp_path / "f").exists()
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) == 0
    assert len(server.seen) == 3


def test_unknown_hash_is_never_resumed(get, server, tmp_path):
    (tmp_path / "f.part").write_bytes(b"x" * 500)
    assert get(good(send=3000), good(), sha=None) == BODY
    assert server.ranges() == [None, None]


def test_statuses(get, server):
    assert get(status(503), status(429), status(500), good()) == BODY       # may pass
    for code, hint in ((404, "moved"), (403, "HF_TOKEN"), (401, "licence"), (400, "status 400")):
        before = len(server.seen)
        with pytest.raises(DataError, match=hint):
            get(status(code))
        assert len(server.seen) == before + 1                               # will not
    before = len(server.seen)
    with pytest.raises(DataError, match="status 500"):
        get(status(500))
    assert len(server.seen) == before + D.ATTEMPTS


def test_nobody_listens(server, tmp_path):
    server.httpd.server_close()
    with pytest.raises(DataError, match="5 attempts.*refused"):
        D.download(f"{server.url}/f", tmp_path / "f", SHA, 10)


# ---- redirects and the token -------------------------------------------------------------------------------
def test_redirects_are_followed_but_not_for_ever(get, server):
    server.answers["/g"] = [good()]
    assert get(status(302, Location="/g")) == BODY
    server.seen.clear()
    with pytest.raises(DataError, match="redirects more than 5 times"):
        get(status(307, Location="/f"))
    assert len(server.seen) == D.REDIRECTS + 1


@pytest.mark.parametrize("to", ["http://192.0.2.1/f", "http://example.com/f", "file:///etc/passwd",
                                "ftp://127.0.0.1/", "https://user:secret@127.0.0.1/f"])
def test_redirects_lead_to_https_only(get, server, to):
    with pytest.raises(DataError, match="not plain https"):
        get(status(302, Location=to))
    assert len(server.seen) == 1


def test_an_address_that_is_none(get, server):
    with pytest.raises(DataError, match="5 attempts"):
        get(status(302, Location="http://[::1"))
    server.answers["/a%20b"] = [good()]
    assert get(status(302, Location="/a b")) == BODY


class Answer(io.BytesIO):
    """What urllib returns, enough of it."""
    status = 200

    class headers(dict):
        @staticmethod
        def get_content_type():
            return "application/octet-stream"
    headers = headers()


@pytest.fixture
def world(monkeypatch):
    """A world of addresses: {url: location or bytes}; records (url, Authorization)."""
    seen, pages = [], {}

    def opened(request, timeout):
        seen.append((request.full_url, request.get_header("Authorization")))
        page = pages[request.full_url]
        if isinstance(page, str):
            raise urllib.error.HTTPError(request.full_url, 302, "", {"Location": page}, io.BytesIO())
        return Answer(page)
    monkeypatch.setattr(D._opener, "open", opened)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return seen, pages


def test_the_token_stays_with_the_hub(world, tmp_path):
    seen, pages = world
    hub, cdn = "https://huggingface.co/m/f", "https://cdn.example/f?signature=1"
    pages.update({hub: cdn, cdn: BODY})
    D.download(hub, tmp_path / "f", SHA, len(BODY))
    assert seen == [(hub, "Bearer hf_secret"), (cdn, None)]


@pytest.mark.parametrize("url", [
    "https://huggingface.co.evil.example/f", "https://evil.example/huggingface.co/f",
    "https://mirror.example/https://huggingface.co/f", "https://huggingface.co:444/f",
    "https://sub.huggingface.co/f"])
def test_lookalikes_get_no_token(world, tmp_path, url):
    seen, pages = world
    pages[url] = BODY
    D.download(url, tmp_path / "f", SHA, len(BODY))
    assert seen == [(url, None)]


@pytest.mark.parametrize("url", ["http://huggingface.co/f", "https://huggingface.co@evil.example/f"])
def test_and_some_are_not_even_asked(world, tmp_path, url):
    with pytest.raises(DataError, match="not plain https"):
        D.download(url, tmp_path / "f", SHA, 10)
    assert not world[0]


def test_the_hub_cannot_be_downgraded(world, tmp_path):
    seen, pages = world
    pages["https://huggingface.co/f"] = "http://127.0.0.1:1/f"              # this machine, but from outside
    with pytest.raises(DataError, match="not plain https"):
        D.download("https://huggingface.co/f", tmp_path / "f", SHA, 10)
    assert len(seen) == 1


def test_a_broken_token_is_not_shown(world, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_sec\nret")
    with pytest.raises(UserError) as e:
        D.download("https://huggingface.co/f", tmp_path / "f", SHA, 10)
    assert "HF_TOKEN" in str(e.value) and "sec" not in str(e.value) and not world[0]


# ---- whole sources -----------------------------------------------------------------------------------------
REVISION = "a" * 40


def files(**bodies):
    """{name: body} -> Files on the hub; a body in a list has no known hash."""
    out = []
    for name, body in bodies.items():
        name = name.replace("__", ".")
        sha = None if isinstance(body, list) else hashlib.sha256(body).hexdigest()
        out.append(S.File(name, f"{D.HUB}/org/tiny/resolve/{REVISION}/{name}", 1, sha))
    return out


@pytest.fixture
def tiny(server, monkeypatch, tmp_path):
    """A model `tiny` on a mirror; the cache is in tmp_path/home."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    model = {"config__json": b"{}", "tokenizer__json": [b"[1]"], "model__safetensors": BODY}
    source = S.Source("tiny", files(**model), None, "org/tiny", REVISION)
    monkeypatch.setitem(F.MODELS, "tiny", source)
    for file, body in zip(source.files, model.values()):
        body = body[0] if isinstance(body, list) else body
        server.answers[f"/org/tiny/resolve/{REVISION}/{file.name}"] = [good(body)]
    return tmp_path / "home" / "hub" / "models--org--tiny"


def test_a_model_goes_into_the_cache_and_is_found_there(tiny, server, capsys):
    assert F.find_cached("tiny") is F.find_cached("org/tiny") is None
    assert F.main(["tiny"]) == 0
    folder = tiny / "snapshots" / REVISION
    out, err = capsys.readouterr()
    assert out == f"{folder}\npython train.py --init tiny\n"
    assert err.count("and is right") == 2 and err.count("NOT VERIFIED") == 1
    assert F.find_cached("tiny") == F.find_cached("org/tiny") == folder
    assert (tiny / "refs" / "main").read_text() == REVISION
    assert (folder / "model.safetensors").read_bytes() == BODY
    came = hashlib.sha256(b"[1]").hexdigest()
    assert (folder / "tokenizer.json.sha256").read_text() == f"{came}  tokenizer.json\n"
    assert len(server.seen) == 3 and not any("Authorization" in headers for _, headers in server.seen)
    assert F.main(["tiny"]) == 0 and len(server.seen) == 3              # all there: nobody is asked


def test_a_damaged_file_is_replaced_and_an_unverified_one_is_not(tiny, server, tmp_path, capsys):
    folder = F.fetch("tiny", tmp_path / "m")
    assert folder == tmp_path / "m" and not tiny.exists()
    (folder / "model.safetensors").write_bytes(b"broken")
    F.fetch("tiny", folder)
    assert (folder / "model.safetensors").read_bytes() == BODY and len(server.seen) == 4
    (folder / "tokenizer.json").write_bytes(b"edited")
    with pytest.raises(DataError, match="has changed since it came; delete it and tokenizer.json.sha256"):
        F.fetch("tiny", folder)
    (folder / "tokenizer.json.sha256").unlink()
    F.fetch("tiny", folder)
    assert (folder / "tokenizer.json").read_bytes() == b"edited" and len(server.seen) == 4


def test_what_other_tools_cached_is_used(tiny, server, monkeypatch, tmp_path, capsys):
    def snapshot(base, revision, *names):
        (base / "snapshots" / revision).mkdir(parents=True)
        for name in names:
            (base / "snapshots" / revision / name).write_bytes(b"{}")
        return base / "snapshots" / revision
    snapshot(tiny, "b" * 40, "config.json", "pytorch_model.bin")            # pickles are never read
    snapshot(tiny, "0" * 40, "model.safetensors")                           # half a model
    assert F.find_cached("tiny") is None
    c = snapshot(tiny, "c" * 40, "config.json", "model.safetensors.index.json")
    assert F.find_cached("tiny") == c
    d = snapshot(tiny, "d" * 40, "config.json", "model.safetensors")
    (tiny / "refs").mkdir()
    (tiny / "refs" / "main").write_text("d" * 40 + "\n")
    assert F.find_cached("tiny") == F.find_cached("org/tiny") == d          # what the ref says
    assert F.fetch("tiny") == d and not server.seen
    assert "not checked" in capsys.readouterr().err
    assert F.fetch("tiny", tmp_path / "m") == tmp_path / "m" and len(server.seen) == 3      # --out means it
    with pytest.raises(DataError, match="no config.json there"):            # and so does --from
        F.fetch("tiny", source=tmp_path / "none")
    (tiny / "snapshots" / REVISION).rmdir()
    a = snapshot(tiny, REVISION, "config.json", "model.safetensors")
    assert F.find_cached("tiny") == a and F.find_cached("org/tiny") == d    # the known commit comes first
    assert F.fetch("tiny") == a and (a / "model.safetensors").read_bytes() == BODY          # and is checked
    assert (tiny / "refs" / "main").read_text() == "d" * 40 + "\n"          # their business
    (tiny / "refs" / "main").write_text("../../../../etc")
    assert F.find_cached("org/tiny") == a
    old = snapshot(tiny.parent / "models--tiny", REVISION, "config.json", "model.safetensors")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert F.find_cached("tiny") is None and F.find_cached("../..") is None
    monkeypatch.setenv("HF_HUB_CACHE", str(tiny.parent))
    monkeypatch.setitem(F.MODELS, "tiny", F.MODELS["tiny"]._replace(repo="org/other"))
    assert F.find_cached("tiny") == old == F.fetch("tiny")


def test_only_the_hub_has_a_mirror(tiny, monkeypatch, tmp_path):
    urls = []
    monkeypatch.setattr(F, "download", lambda url, target, *_: (urls.append(url), target.write_bytes(b"")))
    for endpoint in ("https://mirror.example/hub/", "https://mirror.example/hub", ""):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        F.fetch("tiny", tmp_path / f"m{len(urls)}")
    end = f"/org/tiny/resolve/{REVISION}/config.json"
    assert urls[::3] == [f"https://mirror.example/hub{end}"] * 2 + [f"{D.HUB}{end}"]
    F.fetch("alpaca", tmp_path / "a")
    assert urls[-1] == S.DATASETS["alpaca"].files[0].url


def test_offline(tiny, server, monkeypatch, tmp_path, capsys):                         # [76]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert F.main(["tiny"]) == 65
    err = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in err and not server.seen
    assert "fetch.py tiny --from FOLDER, with config.json, tokenizer.json, model.safetensors in it" in err
    copies = tmp_path / "copies"
    copies.mkdir()
    for name, body in (("config.json", b"{}"), ("tokenizer.json", b"[1]"), ("model.safetensors", BODY)):
        (copies / name).write_bytes(body)
    assert F.main(["tiny", "--from", str(copies)]) == 0
    assert F.main(["tiny"]) == 0                                            # there: offline does not matter
    assert not server.seen and F.find_cached("tiny")


def test_from_is_checked_like_a_download(tiny, tmp_path, capsys):
    copies = tmp_path / "copies"
    copies.mkdir()
    for source, sentence in ((copies, "no config.json there; give a folder with config.json, tokenizer.json"),
                             (tmp_path / "none", "no config.json there")):
        assert F.main(["tiny", "--out", str(tmp_path / "m"), "--from", str(source)]) == 65
        assert sentence in capsys.readouterr().err
    (copies / "config.json").write_bytes(b"{ }")
    assert F.main(["tiny", "--out", str(tmp_path / "m"), "--from", str(copies)]) == 65
    assert "is not the config.json expected" in capsys.readouterr().err
    (copies / "config.json").write_bytes(b"{}")
    (copies / "tokenizer.json").write_bytes(b"x" * (10 ** 6 + 1))
    assert F.main(["tiny", "--out", str(tmp_path / "m"), "--from", str(copies)]) == 65
    assert "is not the tokenizer.json expected" in capsys.readouterr().err
    (copies / "tokenizer.json").unlink()
    assert F.main(["tiny", "--out", str(tmp_path / "m"), "--from", str(copies / "config.json")]) == 65
    assert "no tokenizer.json there" in capsys.readouterr().err         # one file does not stand for three
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["config.json"]


def test_one_file_from_a_file_of_any_name(monkeypatch, tmp_path):
    source = S.Source("one", [S.File("input.txt", "https://nowhere.example/f", 1, SHA)])
    monkeypatch.setitem(F.DATASETS, "one", source)
    (tmp_path / "renamed").write_bytes(BODY)
    assert F.fetch("one", tmp_path / "o", tmp_path / "renamed") == tmp_path / "o" / "input.txt"
    assert (tmp_path / "o" / "input.txt").read_bytes() == BODY


# ---- archives ----------------------------------------------------------------------------------------------
def make_zip(path, *members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, body, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, compression
            z.writestr(info, body)
    return path


def make_tar(path, *members):
    with tarfile.open(path, "w:gz") as t:
        for name, body, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd" if kind in b"12" else "", len(body)
            t.addfile(info, io.BytesIO(body))
    return path


@pytest.fixture
def boxed(tmp_path):
    (tmp_path / "box").mkdir()
    return tmp_path / "box"


def test_good_archives(boxed, tmp_path):
    text = bytes(range(256))
    make_zip(tmp_path / "a.zip", ("d/", b"", 0o040755), ("d/x.txt", text, 0o100644), ("y.txt", b"", 0))
    S.unpack(tmp_path / "a.zip", boxed)
    assert (boxed / "d" / "x.txt").read_bytes() == text and (boxed / "y.txt").read_bytes() == b""
    make_tar(tmp_path / "a.tar.gz", ("./e", b"", tarfile.DIRTYPE), ("./e/x.txt", text, tarfile.REGTYPE))
    S.unpack(tmp_path / "a.tar.gz", boxed)
    assert (boxed / "e" / "x.txt").read_bytes() == text


@pytest.mark.parametrize("name", ["../x", "d/../../x", "/tmp/x", "..\\x", "\\x", "C:x", "d/.."])
def test_members_outside_the_folder(boxed, tmp_path, name):                            # [74]
    plain = tarfile.REGTYPE
    for archive in (make_zip(tmp_path / "a.zip", ("good", b"1", 0), (name, b"2", 0)),
                    make_tar(tmp_path / "a.tgz", ("good", b"1", plain), (name, b"2", plain))):
        with pytest.raises(DataError, match="outside the target folder; nothing was extracted"):
            S.unpack(archive, boxed)
        assert not list(boxed.iterdir())


def test_members_that_are_no_files(boxed, tmp_path):                                   # [74]
    kinds = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE
    archives = [make_tar(tmp_path / f"{i}.tar.gz", ("good", b"1", tarfile.REGTYPE), ("x", b"", kind))
                for i, kind in enumerate(kinds)]
    archives += [make_zip(tmp_path / f"{i}.zip", ("good", b"1", 0), ("x", b"/etc/passwd", mode))
                 for i, mode in enumerate((0o120777, 0o020666, 0o010644))]
    for archive in archives:
        with pytest.raises(DataError, match="is a link or a device"):
            S.unpack(archive, boxed)
        assert not list(boxed.iterdir())


def test_bombs(boxed, tmp_path, monkeypatch):                                          # [75]
    for archive in (make_zip(tmp_path / "a.zip", ("zeros", bytes(10 ** 6), 0)),
                    make_tar(tmp_path / "a.tar.gz", ("zeros", bytes(10 ** 6), tarfile.REGTYPE))):
        with pytest.raises(DataError, match="bomb"):
            S.unpack(archive, boxed)
    many = make_zip(tmp_path / "b.zip", *((str(i), b"", 0) for i in range(S.MAX_FILES + 1)))
    with pytest.raises(DataError, match="beyond 1000 files"):
        S.unpack(many, boxed)
    monkeypatch.setattr(S, "MAX_BYTES", 100)
    with pytest.raises(DataError, match="100 bytes"):
        S.unpack(make_zip(tmp_path / "c.zip", ("x", os.urandom(101), 0)), boxed)
    assert not list(boxed.iterdir())


def test_a_bomb_is_not_read_to_its_end(boxed, tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "a.tar.gz", *((f"{i}", bytes(10 ** 6), tarfile.REGTYPE) for i in range(20)))
    looked, members = [], S._members
    monkeypatch.setattr(S, "_members", lambda a: (looked.append(m) or m for m in members(a)))
    with pytest.raises(DataError, match="bomb"):
        S.unpack(archive, boxed)
    assert len(looked) < 20


def test_broken_archives(boxed, tmp_path):
    whole = make_tar(tmp_path / "a.tar.gz", ("x", os.urandom(9000), tarfile.REGTYPE)).read_bytes()
    whole_zip = make_zip(tmp_path / "a.zip", ("x", os.urandom(9000), 0)).read_bytes()
    flipped = whole_zip[:100] + bytes([whole_zip[100] ^ 1]) + whole_zip[101:]
    for bad in (b"", b"not an archive", whole[:4000], whole_zip[:4000], flipped):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(DataError, match="cannot be extracted"):
            S.unpack(tmp_path / "bad", boxed)
        for p in boxed.iterdir():
            p.unlink()
    with pytest.raises(DataError, match="is there twice"):
        with pytest.warns(UserWarning):
            make_zip(tmp_path / "twice.zip", ("x", b"1", 0), ("x", b"2", 0))
        S.unpack(tmp_path / "twice.zip", boxed)


# ---- what becomes of the data ------------------------------------------------------------------------------
@pytest.fixture
def convert(monkeypatch, tmp_path):
    """convert(name, {file: bytes}) runs a source's own converter on these files as if they were right."""
    def run(name, raw):
        given = tmp_path / "given"
        given.mkdir(exist_ok=True)
        for file, body in raw.items():
            (given / file).write_bytes(body)
        pinned = [f._replace(sha256=hashlib.sha256(raw[f.name]).hexdigest()) for f in S.DATASETS[name].files]
        monkeypatch.setitem(F.DATASETS, name, S.DATASETS[name]._replace(files=pinned))
        return F.fetch(name, tmp_path / "out", given)
    return run


def test_sms_spam(convert, tmp_path):
    lines = [f"{'spam' if i % 4 == 0 else 'ham'}\tmessage {i // 2}\u0085 of £{i // 2} " for i in range(200)]
    assert len(lines) == 2 * len({line.split("\t")[1] for line in lines})
    body = ("\n".join(lines) + "\n").encode()
    make_zip(tmp_path / "z", ("SMSSpamCollection", body, 0), ("readme", b"hi", 0))
    raw = {"sms+spam+collection.zip": (tmp_path / "z").read_bytes()}
    folder = convert("sms_spam", raw)
    parts = {split: formats.load(folder, split) for split in ("train", "valid", "test")}
    assert all(d.kind == "label" for d in parts.values()) and sum(len(d.rows) for d in parts.values()) == 200
    assert len(parts["train"].rows) > 120 and len(parts["valid"].rows) > 4 and len(parts["test"].rows) > 4
    texts = [{r["text"] for r in d.rows} for d in parts.values()]
    assert sum(map(len, texts)) == 100                                  # both copies are in one split
    assert "message 7\u0085 of £7" in set().union(*texts)               # \u0085 ends no line here
    (folder / "train.jsonl").write_text("edited")
    convert("sms_spam", raw)
    assert (folder / "train.jsonl").read_text() == "edited"
    assert not [p for p in folder.iterdir() if p.is_dir()]


def test_hh(convert):
    asked = "\n\nHuman: Hi\n\nAssistant:"
    row = {"chosen": f"{asked} Hello.", "rejected": f"{asked} No.", "other": 1}
    raw = {name: gzip.compress((json.dumps(row) + "\n").encode() * n)
           for name, n in (("train.jsonl.gz", 3), ("test.jsonl.gz", 2))}
    folder = convert("hh-rlhf", raw)
    data = formats.load(folder, "test")
    assert data.kind == "pairs" and len(data.rows) == 2 and data.rows[0]["rejected"].strip() == "No."
    assert json.loads((folder / "train.jsonl").read_text().splitlines()[0]).keys() == {"chosen", "rejected"}


def test_damaged_contents(convert, tmp_path):
    def boxed(body):
        archive = make_zip(tmp_path / "z", ("SMSSpamCollection", body, 0))
        return {"sms+spam+collection.zip": archive.read_bytes()}
    with pytest.raises(DataError, match=r"\(a bomb\?\); nothing was extracted, so get another copy$"):
        convert("sms_spam", boxed(bytes(10 ** 6)))
    for name, raw in (("hh-rlhf", {"train.jsonl.gz": b"?", "test.jsonl.gz": b"?"}),
                      ("hh-rlhf", {"train.jsonl.gz": gzip.compress(b"[1]\n"), "test.jsonl.gz": b""}),
                      ("e2e", {"trainset.csv": b"a,b\n1,2\n", "devset.csv": b"", "testset_w_refs.csv": b""}),
                      ("sms_spam", boxed(b"eggs\tx\n")), ("sms_spam", boxed(b"ham x\n"))):
        with pytest.raises(DataError, match="do not read as they should"):
            convert(name, raw)
        assert not (tmp_path / "out" / "train.jsonl").exists()


def as_csv(rows):
    """The challenge's own form: CR LF, quotes where needed."""
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\r\n").writerows([("mr", "ref"), *rows])
    return out.getvalue().encode()


def test_e2e(convert):
    pairs = [("name[A], near[B]", 'It is "A",\r\n near B. '), ("name[A], near[B]", "A, B"), ("name[C] ", "C")]
    raw = {n: as_csv(pairs) for n in ("trainset.csv", "devset.csv", "testset_w_refs.csv")}
    raw["trainset.csv"] = b"\xef\xbb\xbf" + raw["trainset.csv"]            # a BOM is no part of "mr"
    folder = convert("e2e", raw)
    train = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert train[0] == {"input": "name[A], near[B]", "output": 'It is "A",\r\n near B.'} and len(train) == 3
    assert formats.load(folder, "train").kind == formats.load(folder, "test").kind == "chat"
    assert train[2]["input"] == "name[C]"
    assert formats.load(folder, "valid").rows[0]["references"] == ['It is "A",\r\n near B.', "A, B"]


def test_e2e_on_the_real_texts(convert, assets):
    train, valid = ([json.loads(line) for line in open(assets / "e2e" / f"{split}.jsonl", encoding="utf-8")]
                    for split in ("train", "valid"))
    raw = as_csv((r["input"], r["output"]) for r in train)
    assert len(raw) == 9_340_189 - 3                  # the published size; our copy lost three blanks
    dev = as_csv((r["input"], o) for r in valid for o in r["outputs"])
    train = train[:3000]
    raw = as_csv((r["input"], r["output"]) for r in train)
    folder = convert("e2e", {"trainset.csv": raw, "devset.csv": dev, "testset_w_refs.csv": dev})
    for split, rows in (("train", train), ("valid", valid)):
        assert [json.loads(x) for x in open(folder / f"{split}.jsonl", encoding="utf-8")] == rows


# ---- the table and the command -----------------------------------------------------------------------------
def test_the_table_is_sane():
    for name, source in {**S.MODELS, **S.DATASETS}.items():
        assert re.fullmatch(r"[a-z0-9_-]+", name) and source.files
        for file in source.files:
            assert file.url.startswith("https://") and pathlib.PurePath(file.name).name == file.name
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert source.repo in file.url and source.revision in file.url
    assert all(re.fullmatch("[0-9a-f]{40}", m.revision) for m in S.MODELS.values())
    unknown = [(n, f.name) for n, s in {**S.MODELS, **S.DATASETS}.items() for f in s.files if not f.sha256]
    assert unknown == [("gpt2-large", "tokenizer.json"), ("gpt2-large", "tokenizer_config.json")]


def test_tinyshakespeare_is_the_real_one(assets):
    data = (assets / "tinyshakespeare" / "input.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == S.DATASETS["tinyshakespeare"].files[0].sha256


def test_it_runs_as_a_script_from_anywhere(tmp_path):
    run = subprocess.run([sys.executable, str(ROOT / "data" / "fetch.py"), "gtp2"], cwd=tmp_path, text=True,
                         capture_output=True)
    assert run.returncode == 2 and not run.stdout
    assert run.stderr.startswith("fetch.py: gtp2 is not known here (did you mean gpt2?)")
    assert run.stderr.count("\n") == 1


def test_list_and_exit_codes(monkeypatch, tmp_path, capsys):
    assert F.main(["--list"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [*S.MODELS, *S.DATASETS] and not err
    assert out.count("no known sha256") == 1
    for argv in ([], ["gpt2", "--lis"], ["gpt2", "--frm", "x"]):
        with pytest.raises(SystemExit) as e:
            F.main(argv)
        assert e.value.code == 2
    (tmp_path / "taken").write_text("a file")
    assert F.main(["alpaca", "--out", str(tmp_path / "taken")]) == 2
    assert "taken cannot be used" in capsys.readouterr().err

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(F, "_obtain", interrupted)
    assert F.main(["alpaca", "--out", str(tmp_path / "a")]) == 75
