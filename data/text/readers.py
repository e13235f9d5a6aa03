r"""data/text/readers.py: a data file -> records (dicts), each with its location.

    .jsonl .json    one object per line, or one array of objects (when the first character is "[")
    .csv .tsv       the first line names the keys; in a .tsv a quote is an ordinary character
    .txt            one record {"text": the whole file}

Files are UTF-8, with or without a byte order mark, with any line ends. JSON is read more strictly than by
Python's json: a key that appears twice, NaN, Infinity and half of a surrogate pair are errors, because json
would keep or replace them silently.

A location is "FILE:LINE", or "FILE:item N" in an array. Every error message starts with it.

Public: read_records, describe_type, SUFFIXES, MAX_LINE
"""
import csv
import io
import json
import re

from data.runtime.files import DataError, unique_keys

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
MAX_LINE = 32 << 20                                     # bytes; longer means: a file without line ends
EXAMPLE = '{"prompt": "...", "completion": "..."}'
TYPE_NAMES = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list",
              dict: "an object"}


def describe_type(value):
    """The JSON type of a value, for error messages: "a string", "a number", "null", ..."""
    return TYPE_NAMES.get(type(value), "null")


def read_records(path):
    """Yield (location, dict) for every record of a file (pathlib.Path).

    Raises DataError for an unknown suffix, bytes that are not UTF-8, broken JSON or CSV, and records that are
    not objects; OSError when the file cannot be opened.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown file type; a data file ends in {' '.join(SUFFIXES)}")
    if suffix == ".txt":
        records = _read_text(path)
    elif suffix in (".csv", ".tsv"):
        records = _read_table(path)
    else:
        records = _read_json(path)
    for location, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{location}: {describe_type(record)}; a row is an object such as {EXAMPLE}")
        yield location, record


def _decode(raw, path, line=1):
    """bytes -> str; `line` is the number of the first line of `raw`."""
    try:
        return raw.decode("utf-8-sig")                  # -sig drops a byte order mark
    except UnicodeDecodeError as e:
        line += e.object.count(b"\n", 0, e.start)
        byte = e.object[e.start]
        raise DataError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from e


def _read_text(path):
    yield f"{path}:1", {"text": _decode(path.read_bytes(), path)}


def _read_json(path):
    with open(path, "rb") as f:
        start = f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        f.seek(0)
        if start.startswith(b"["):
            yield from _read_array(f, path)
        else:
            yield from _read_lines(f, path)


def _read_array(f, path):
    text = _decode(f.read(), path)
    rows = _parse_json(text, path, 1, "a file that starts with [ is one array of rows")
    for n, row in enumerate(rows, 1):
        yield f"{path}:item {n}", row


def _read_lines(f, path):
    number = 0
    while True:
        line = f.readline(MAX_LINE + 1)
        if not line:
            return
        number += 1
        if len(line) > MAX_LINE:
            raise DataError(f"{path}:{number}: a line of over {MAX_LINE >> 20} MiB; split it into several "
                            "rows")
        text = _decode(line, path, number).strip()
        if text:
            yield f"{path}:{number}", _parse_json(text, path, number, "each line is one whole object")


def _parse_json(text, path, line, rule):
    """The value of a JSON text that begins at a line; `rule` is what an error message reminds of."""
    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):       # only an escape can spell half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as e:
        raise DataError(f"{path}:{line + e.lineno - 1}: not JSON ({e.msg}, column {e.colno}); {rule}") from e
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}"
        raise DataError(f"{path}:{line}: {half} is half of a surrogate pair, not a character") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}:{line}: not JSON ({e})") from e


def _refuse_constant(name):
    raise ValueError(f"{name} is no JSON number")


def _read_table(path):
    csv.field_size_limit(MAX_LINE)
    text = io.StringIO(_decode(path.read_bytes(), path), newline="")
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(text, strict=True, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(text, strict=True)
    try:
        header = next(reader, [])
        unique_keys([(key, None) for key in header])
        for cells in reader:
            if not cells:                               # a blank line
                continue
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells under a header of {len(header)}: {', '.join(header)}")
            yield f"{path}:{reader.line_num}", dict(zip(header, cells))
    except (csv.Error, ValueError) as e:
        raise DataError(f"{path}:{reader.line_num}: not a table ({e})") from e
