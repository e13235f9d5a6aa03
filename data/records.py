"""data/records.py: data files as a stream of (place, record), strictly read and not yet interpreted.

    .jsonl .json    one object per line, or one array of objects (seen by its first character)
    .csv .tsv       a header names the keys; in a .tsv a quote is only a quote
    .txt            one record {"text": the whole file}

UTF-8 only, with or without a byte order mark, any line ends. JSON is read more strictly than by Python: a key
twice in one object, NaN, Infinity and half a surrogate pair are errors: they would change data in silence.
A place is "file:17" (or "file:item 17" in an array) and starts every error sentence.

Public: records, what
"""
import collections
import csv
import io
import json
import re

from data.files import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
MAX_LINE = 32 << 20                                     # bytes; a longer "line" is a file without line ends
EXAMPLE = '{"prompt": "...", "completion": "..."}'


def what(value):
    """What was found, for error sentences."""
    return {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list",
            dict: "an object"}.get(type(value), "null")


def records(path):
    """(place, dict) for every record of a file."""
    suffix = path.suffix.lower()
    read = {".txt": _text, ".csv": _table, ".tsv": _table}.get(suffix, _json)
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: a data file ends in {' '.join(SUFFIXES)}; save it as one of these")
    for at, row in read(path):
        if not isinstance(row, dict):
            raise DataError(f"{at}: {what(row)}; a row is an object such as {EXAMPLE}")
        yield at, row


def _utf8(raw, path, line=1):
    try:
        return raw.decode("utf-8-sig")                  # -sig: a byte order mark is no part of the text
    except UnicodeDecodeError as e:
        line, byte = line + e.object.count(b"\n", 0, e.start), e.object[e.start]
        raise DataError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from e


def _text(path):
    yield f"{path}:1", {"text": _utf8(path.read_bytes(), path)}


def _json(path):
    with open(path, "rb") as f:
        array = f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        f.seek(0)
        if array:
            rows = _parse(_utf8(f.read(), path), path, 1, "a file that starts with [ is one array of rows")
            yield from ((f"{path}:item {n}", row) for n, row in enumerate(rows, 1))
            return
        for n, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise DataError(f"{path}:{n}: a line of over {MAX_LINE >> 20} MiB; cut it into several rows")
            if text := _utf8(line, path, n).strip():
                yield f"{path}:{n}", _parse(text, path, n, "each line is one whole object")


def _parse(text, path, line, rule):
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):       # only an escape can smuggle in half a pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as e:
        raise DataError(f"{path}:{line + e.lineno - 1}: not JSON ({e.msg}, column {e.colno}); {rule}") from e
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}"
        raise DataError(f"{path}:{line}: {half} is half of a surrogate pair, not a character") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}:{line}: not JSON ({e})") from e


def _unique(pairs):
    row = dict(pairs)                                   # of two, json itself keeps the last
    if len(row) < len(pairs):
        key = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the key "{key}" appears twice')
    return row


def _constant(name):
    raise ValueError(f"{name} is no JSON number")


def _table(path):
    csv.field_size_limit(MAX_LINE)
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
    reader = csv.reader(io.StringIO(_utf8(path.read_bytes(), path), newline=""), strict=True, **style)
    try:
        header = next(reader, [])
        _unique([(key, None) for key in header])
        for cells in filter(None, reader):              # [] is a blank line
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells under a header of {len(header)}: {', '.join(header)}")
            yield f"{path}:{reader.line_num}", dict(zip(header, cells))
    except (csv.Error, ValueError) as e:
        raise DataError(f"{path}:{reader.line_num}: not a table ({e})") from e
