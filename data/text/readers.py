r"""data/text/readers.py: a data file -> records (dicts), each with its location.

    .jsonl .json    one object per line, or one array of objects (when the first character is "[")
    .csv .tsv       the first line names the keys; in a .tsv a quote is an ordinary character
    .txt            one record {"text": the whole file}
    .gz             behind one of these: the same, compressed (data.jsonl.gz)

Files are UTF-8, with or without a byte order mark, with any line ends (\n, \r\n or \r). JSON is read more
strictly than by Python's json: a key that appears twice, NaN, Infinity and half of a surrogate pair are
errors, because json would keep or replace them silently.

In the first line of a table blanks around a name are removed, and a column without a name becomes "unnamed
column N". Where every name but the first has a blank before it, the separator is ", ": the blank before a
cell is then no part of it, either. Lines without content are skipped.

A location is "FILE:LINE", the line on which the record begins, or "FILE:item N" in an array. Every error
message starts with it.

Public: read_records, parse_json, file_type, describe_type, shown, SUFFIXES, MAX_LINE
"""
import csv
import gzip
import io
import json
import re
import zlib

from data.runtime.files import DataError, printable, unique_keys

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
MAX_LINE = 32 << 20                                     # characters; longer means: a file without line ends
EXAMPLE = '{"prompt": "...", "completion": "..."}'
TYPE_NAMES = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list",
              dict: "an object"}


def describe_type(value):
    """The JSON type of a value, for error messages: "a string", "a number", "null", ..."""
    return TYPE_NAMES.get(type(value), "null")


def shown(value):
    """A value of a record as JSON, cut, for error messages."""
    try:
        return printable(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return describe_type(value)


def file_type(path):
    """The suffix that says how a file is read: ".csv" for data.csv and for data.csv.gz."""
    if path.suffix.lower() == ".gz":
        path = path.with_suffix("")
    return path.suffix.lower()


def read_records(path):
    """Yield (location, dict) for every record of a file (pathlib.Path).

    Raises DataError for an unknown suffix, bytes that are not UTF-8, a damaged .gz, broken JSON or CSV, and
    records that are not objects; OSError when the file cannot be opened.
    """
    suffix = file_type(path)
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown file type; a data file ends in {' '.join(SUFFIXES)}, perhaps with "
                        ".gz behind it")
    try:
        for location, record in _read(path, suffix):
            if not isinstance(record, dict):
                raise DataError(f"{location}: {describe_type(record)}; a row is an object such as {EXAMPLE}")
            yield location, record
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise DataError(f"{path}: not a whole .gz file ({printable(str(e))}); compress it again, or give the "
                        "file as it is") from e


def _read(path, suffix):
    try:
        if suffix == ".txt":
            yield from _read_text(path)
        elif suffix in (".csv", ".tsv"):
            yield from _read_table(path, suffix)
        else:
            yield from _read_json(path)
    except UnicodeDecodeError as e:
        raise _not_utf8(path) from e


# ---- bytes and lines ---------------------------------------------------------------------------------------
def _open(path):
    """A binary file of the content, decompressed."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def _open_text(path, newline):
    """newline None: every line end becomes \n; "": they stay as they are."""
    # -sig drops a byte order mark
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline=newline)


def _count_line_ends(raw):
    return len(re.findall(rb"\r\n?|\n", raw))


def _not_utf8(path):
    """The error for the first byte of a file that is not UTF-8."""
    line = 1
    with _open(path) as f:
        for raw in f:
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as e:
                line += _count_line_ends(raw[:e.start])
                byte = raw[e.start]
                return DataError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8")
            line += _count_line_ends(raw)
    return DataError(f"{path}:{line}: the last character is not whole; save the file as UTF-8")


def _read_text(path):
    with _open_text(path, "") as f:
        yield f"{path}:1", {"text": f.read()}


# ---- JSON --------------------------------------------------------------------------------------------------
def _read_json(path):
    with _open_text(path, None) as f:
        start = f.read(4096).lstrip("\ufeff").lstrip()
        f.seek(0)
        if start.startswith("["):
            yield from _read_array(f, path)
        else:
            yield from _read_lines(f, path)


def _read_array(f, path):
    rows = parse_json(f.read().lstrip("\ufeff"), lambda line: f"{path}:{line}",
                      "a file that starts with [ is one array of rows")
    for n, row in enumerate(rows, 1):
        yield f"{path}:item {n}", row


def _read_lines(f, path):
    number = 0
    while True:
        line = f.readline(MAX_LINE + 1)
        if not line:
            return
        number += 1
        location = f"{path}:{number}"
        if len(line) > MAX_LINE:
            raise DataError(f"{location}: a line of over {MAX_LINE >> 20} MiB; split it into several rows")
        text = line.lstrip("\ufeff").strip()            # files with byte order marks, one behind the other
        if text:
            yield location, parse_json(text, lambda _: location, "each line is one whole object")


def parse_json(text, locate, rule):
    """The value of a JSON text. Raises DataError.

    locate   (line of the text, from 1) -> location
    rule     what an error message reminds of
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):       # only an escape can spell half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as e:
        raise DataError(f"{locate(e.lineno)}: not JSON ({e.msg}, column {e.colno}); {rule}") from e
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}"
        raise DataError(f"{locate(1)}: {half} is half of a surrogate pair, not a character") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{locate(1)}: not JSON ({printable(str(e))})") from e


def _refuse_constant(name):
    raise ValueError(f"{name} is no JSON number")


# ---- tables ------------------------------------------------------------------------------------------------
def _read_table(path, suffix):
    with _open_text(path, "") as f:
        text = f.read().lstrip("\ufeff")                # a mark twice
    csv.field_size_limit(MAX_LINE)
    dialect = {"strict": True}
    if suffix == ".tsv":
        dialect.update(delimiter="\t", quoting=csv.QUOTE_NONE)
    elif _blank_behind_commas(text):
        dialect.update(skipinitialspace=True)
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    header = None
    begins = 1                                          # the line on which the next record begins
    try:
        for cells in reader:
            location = f"{path}:{begins}"
            begins = reader.line_num + 1
            if not any(map(str.strip, cells)):          # a blank line
                continue
            if header is None:
                header = _column_names(cells, location)
                continue
            if len(cells) != len(header):
                raise DataError(f"{location}: not a table ({len(cells)} cells under a header of "
                                f"{len(header)}: {printable(', '.join(header))})")
            yield location, dict(zip(header, cells))
    except csv.Error as e:
        fault = str(e)
        if suffix == ".csv" and "limit" not in fault:
            begins = _open_quote(text, begins)
            fault = 'the quoted cell that begins here does not end; a quote inside a cell is written as ""'
        raise DataError(f"{path}:{begins}: not a table ({fault})") from e


def _blank_behind_commas(text):
    """Whether the separator is ", " in the first line that has one."""
    match = re.search(r"^[^\r\n]*\S[^\r\n]*", text, re.M)
    names = match[0].split(",") if match else []
    return len(names) > 1 and all(name.startswith(" ") for name in names[1:])


def _column_names(cells, location):
    names = [cell.strip() or f"unnamed column {n}" for n, cell in enumerate(cells, 1)]
    try:
        unique_keys([(name, None) for name in names])
    except ValueError as e:
        raise DataError(f"{location}: not a table ({printable(str(e))})") from e
    return names


def _open_quote(text, first):
    """The line of the quote behind which a .csv cannot be read; the faulty record begins on line `first`."""
    lines = io.StringIO(text, newline="").readlines()[first - 1:]
    line = first
    opened = first
    state = "cell begins"
    for match in re.finditer(r'\r\n?|\n|"|,|[^"\r\n,]+', "".join(lines)):
        token = match[0]
        separates = token[0] in ",\r\n"
        if state == "quoted":
            state = "quote" if token == '"' else state
        elif state == "quote":                          # the end of the cell, or the first half of ""
            if token == '"':
                state = "quoted"
            elif separates:
                state = "cell begins"
            else:
                return opened
        elif token == '"' and state == "cell begins":
            state = "quoted"
            opened = line
        elif separates:
            state = "cell begins"
        elif token.strip():
            state = "plain"
        line += token[0] in "\r\n"
    return opened
