"""data/download.py: one address -> one file, whole and of the expected sha256, or one sentence why not.

The bytes stream into NAME.part under a size ceiling; after a cut they go on by Range (RFC 9110, section 14)
where the server can, and begin anew where it cannot. NAME appears by a rename, once the sha256 is right. A
part whose hash nobody knows is never resumed: nothing would tell a splice of two versions from the file.

Trust. Only https is spoken, or http within this machine, on every hop of a redirect. HF_TOKEN goes to
https://huggingface.co and to nobody else: not to a mirror, not to where the hub redirects. An answer that is
a web page (a login, a proxy) is refused before it can replace what came earlier.

Patience. Cuts, time-outs, 408, 429 and 5xx are tried again after 1, 2, 4 and 8 seconds; all else is final.

Public: download, sha256
"""
import hashlib
import http.client
import os
import re
import ssl
import string
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

from tqdm import tqdm

from data.runtime.files import DataError, UserError

HUB = "https://huggingface.co"
ATTEMPTS, PAUSE, TIMEOUT, REDIRECTS, CHUNK = 5, 1.0, 30, 5, 1 << 20
LOCAL = ("127.0.0.1", "::1", "localhost")
ELSEWHERE = "--from takes a copy that you got elsewhere"


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class _Retry(Exception):
    """The fault may pass."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None                                     # urllib would take the token along


_opener = urllib.request.build_opener(_NoRedirect)


def _shown(url):
    """An address for people, without the signature that its query may hold."""
    return url.partition("?")[0]


def _headers(url, start):
    headers = {"User-Agent": "fetch.py"}
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(HUB + "/"):
        if not re.fullmatch(r"[!-~]+", token):          # else http.client would quote it in its complaint
            raise UserError("HF_TOKEN holds blanks or control characters; copy it again from the hub")
        headers["Authorization"] = f"Bearer {token}"
    return {**headers, "Range": f"bytes={start}-"} if start else headers


def _open(url, start):
    """The answer to a GET of the bytes from `start` on; redirects are followed here, hop by hop."""
    asked, inside = url, urllib.parse.urlsplit(url).hostname in LOCAL
    for _ in range(REDIRECTS + 1):
        parts = urllib.parse.urlsplit(url)
        if "@" in parts.netloc or parts.scheme != "https" and not (
                parts.scheme == "http" and inside and parts.hostname in LOCAL):
            raise DataError(f"{_shown(asked)} leads to an address that is not plain https, and is not "
                            f"followed; {ELSEWHERE}")
        try:
            return _opener.open(urllib.request.Request(url, headers=_headers(url, start)), timeout=TIMEOUT)
        except urllib.error.HTTPError as e:
            e.close()
            if e.code in (301, 302, 303, 307, 308) and e.headers.get("Location"):
                to = urllib.parse.quote(e.headers["Location"], safe=string.punctuation)     # no blanks in it
                url = urllib.parse.urljoin(url, to)
            elif e.code in (408, 416, 429) or e.code >= 500:
                raise _Retry(f"status {e.code}") from e
            else:
                why = ("accept the licence on its page and set HF_TOKEN" if e.code in (401, 403) else
                       "it has moved or never was there")
                raise DataError(f"{_shown(url)} answered with status {e.code}: {why}; or {ELSEWHERE}") from e
    raise DataError(f"{_shown(asked)} redirects more than {REDIRECTS} times; {ELSEWHERE}")


def _stream(url, part, start, limit):
    """Append the missing bytes to `part`, or write all of them where the server ignores the Range."""
    with _open(url, start) as answer:
        resumed = start and answer.status == 206
        if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise _Retry("another range came than was asked for")
        size, length = start if resumed else 0, answer.headers.get("Content-Length", "")
        total = size + int(length) if length.isdecimal() else None
        chunk = answer.read(CHUNK)
        if answer.headers.get_content_type() == "text/html" or \
                not resumed and re.match(rb"\s*<(!doctype|html)", chunk[:64], re.I):
            raise DataError(f"{_shown(url)} answered with a web page instead of data (a login? a proxy?); "
                            f"open it in a browser to see, or {ELSEWHERE}")
        with open(part, "ab" if resumed else "wb") as f, tqdm(
                desc=part.stem, total=total, initial=size, unit="B", unit_scale=True, disable=None) as bar:
            while chunk:
                size += len(chunk)
                if max(size, total or 0) > limit:       # a header's claim is only a reason to stop earlier
                    f.truncate(0)
                    raise DataError(f"{_shown(url)} is larger than the {limit} bytes expected; {ELSEWHERE}")
                f.write(chunk)
                bar.update(len(chunk))
                chunk = answer.read(CHUNK)
            f.flush()
            os.fsync(f.fileno())
        if total not in (None, size):
            raise _Retry(f"{size} of {total} bytes came")


def download(url, target, expected, limit):
    """`url` -> `target`; `expected` is its sha256 or None, `limit` its largest size in bytes."""
    part, problem = target.with_name(target.name + ".part"), ""
    for attempt in range(ATTEMPTS):
        if attempt:
            print(f"{_shown(url)}: {problem}; attempt {attempt + 1} of {ATTEMPTS}", file=sys.stderr)
            time.sleep(PAUSE * 2 ** (attempt - 1))
        if not expected:
            part.unlink(missing_ok=True)
        start = part.stat().st_size if part.exists() else 0
        try:
            if not (start and sha256(part) == expected):        # else only the rename was missing
                _stream(url, part, start, limit)
        except UserError:
            raise
        except (_Retry, urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError,
                ssl.SSLError, ValueError) as e:                 # ValueError: an address that cannot be parsed
            problem = str(getattr(e, "reason", e)) or type(e).__name__
            if problem == "status 416":                         # the part is longer than the file
                part.unlink(missing_ok=True)
            continue
        found = sha256(part)
        if expected in (None, found):
            os.replace(part, target)
            return
        part.unlink()
        problem = f"its sha256 begins {found[:12]}, that of the known file {expected[:12]}"
        if not start:                                           # a splice may be our doing, a whole is not
            raise DataError(f"{_shown(url)} is not the file expected: {problem}; nothing was kept, and "
                            f"{ELSEWHERE}")
    raise DataError(f"{_shown(url)} did not come in {ATTEMPTS} attempts ({problem}); the same command goes "
                    f"on where it stopped, and {ELSEWHERE}")
