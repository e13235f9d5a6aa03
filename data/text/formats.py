"""data/text/formats.py: load files and folders as rows of one row type.

    file -> records (readers.py) -> format (recognise.py) -> rows of one row type (converters.py) -> Data

The first record decides for the file: a later record in another format (recognise.py) is an error. Keys
that are not read are named with the format. For evaluation, "references" (or "outputs") may replace the last
answer of a conversation. Records that train nothing are dropped and counted; none left is an error. Every
row gets a key "line" with its location, such as "data.jsonl:17".

With keep, for tasks whose reward may read any key, every row also has its "record": all keys and values as in
the file, and the "answer" and "references" of a conversation where the file gives none of its own.

Splits. A folder holds train, valid and test files. A single file is split 80/10/10 by content (splits.py). A
folder without a valid file gives 10 % of train to it; a folder without a test file is tested on valid. A data
set with too few rows to split is used whole in every split. Data.source says which of these happened.

Public: load, load_splits, load_lines, load_text, Data, SPLITS, prompt_key, row_json, label_names,
duplicates, leaks, outvoted
"""
import collections
import pathlib
import re
import typing

from data.runtime import cache
from data.runtime.files import DataError, UserError, check_path, printable
from data.text.converters import SkipRow
from data.text.readers import SUFFIXES, read_records
from data.text.recognise import FORMATS, other_format, recognise, to_row, unknown_format
from data.text.splits import (LINE_END, duplicates, label_names, leaks, outvoted, prompt_key, row_json,    # noqa: F401
                              split_rows)

# split: the names, without suffix, of its file in a folder
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}


class Data(typing.NamedTuple):
    """Rows of one row type, and where they come from."""
    rows: list
    row_type: str
    source: str                                         # the file, and the part of it, for messages
    format: str                                         # the format's name, and the keys that are not read
    dropped: dict                                       # {reason: locations of rows that train nothing}

    def count_dropped(self):
        """One sentence for each reason: "2 dropped with an empty answer (data.jsonl:3 is the first)"."""
        return [f"{len(places)} dropped {reason} ({places[0]} is the first)"
                for reason, places in self.dropped.items()]


# ---- records -> rows ---------------------------------------------------------------------------------------
def _echo(name, unread, keep):
    """The name of a format, and the keys that are not read, or only by a reward or as a reference."""
    if not unread:
        return name
    names = ", ".join(printable(key, 40) for key in sorted(unread)[:8])
    more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
    return f"{name} ({'also' if keep else 'not read'}: {names}{more})"


def _record(record, row):
    """What a reward gets of a row: the record of the file, and the right answer of a conversation."""
    kept = dict(record)
    if "messages" in row and kept.get("answer") is None:
        kept["answer"] = row["messages"][-1]["content"]
    if "references" in row:
        kept["references"] = row["references"]
    return kept


def _convert(records, source, keep=False):
    """(location, record) pairs -> Data. The first record fixes the format."""
    converted = []
    first = None
    dropped = collections.defaultdict(list)
    unread = set()
    for location, record in records:
        name, keys = recognise(record, location)
        if first is None:
            if name is None:
                raise unknown_format(record, location, source)
            first = (name, keys, location)
        if name != first[0]:
            raise other_format(record, location, name, first)
        try:
            row, not_read = to_row(record, name, keys, location)
        except SkipRow as reason:
            dropped[str(reason)].append(location)
            continue
        unread |= not_read
        row["line"] = location
        if keep:
            row["record"] = _record(record, row)
        converted.append(row)
    if not converted:
        reasons = ", ".join(f"{len(places)} {reason} ({places[0]} is the first)"
                            for reason, places in dropped.items())
        raise DataError(f"0 usable examples in {source}: {reasons or 'it holds no rows'}")
    return Data(converted, FORMATS[first[0]].row_type, source, _echo(first[0], unread, keep), dict(dropped))


# ---- loading -----------------------------------------------------------------------------------------------
def _part(data, split, held_out):
    rows_of_split = split_rows(data.rows, held_out)[split]
    whole = rows_of_split is data.rows
    part = "all of it, too few rows to split" if whole else f"its {split} part"
    return data._replace(rows=rows_of_split, source=f"{data.source} ({part})")


def load(path_or_name, split=None, keep=False):
    """Data of a file, a folder, or a data set of the toy world: one split of it, or (None) all of it.

    keep: every row has its "record", see above.
    Raises DataError for what cannot be read or interpreted, UserError for an unknown split.
    """
    if split not in (None, *SPLITS):
        raise UserError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
    return _load(path_or_name, [split], keep)[0]


def _load(path_or_name, splits, keep):
    """[Data of each of `splits`]; a file that holds all of them is read once."""
    path = pathlib.Path(path_or_name)
    check_path(path_or_name)
    name = str(path_or_name)
    shown = printable(name, 400)
    if name.split("/")[0] == "toy":                     # a folder of that name is ./toy
        return [_load_toy(name, split, keep) for split in splits]
    try:
        if not path.exists():
            path = cache.find_data(name) or path
        if path.is_dir():
            return [_load_folder(path, split, keep) for split in splits]
        if not path.exists() and name in cache.DATASETS:
            raise DataError(f"{name} is not fetched yet; run python data/fetch.py {name}")
        if not path.is_file():
            fault = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise DataError(f"{shown} {fault}; data is a file ({' '.join(SUFFIXES)}), a folder with "
                            "train.jsonl, a fetched data set, or a name such as toy/sentiment")
        data = _convert(read_records(path), name, keep)
    except OSError as e:
        raise DataError(f"{shown} cannot be read ({e.strerror or e})") from e
    return [data if split is None else _part(data, split, {8: "valid", 9: "test"}) for split in splits]


def load_splits(path_or_name, keep=False):
    """{"train", "valid", "test": Data}; keep as in load. Raises DataError when their row types differ."""
    data = dict(zip(SPLITS, _load(path_or_name, SPLITS, keep)))
    train = data["train"]
    for part in data.values():
        if part.row_type != train.row_type:
            raise DataError(f"{part.source} holds {part.row_type} rows, but {train.source} {train.row_type} "
                            "rows; all splits of a data set have one row type")
    return data


def load_lines(path_or_name):
    """Data of all rows, splits or not; of a .txt, one text row for each line that is not blank. A prompt keeps
    its "answer", if that is text."""
    data = load(path_or_name, keep=True)
    rows = []
    for row in data.rows:
        record = row.pop("record")
        if data.row_type == "prompt" and isinstance(record.get("answer"), str):
            row["answer"] = record["answer"]
        file, _, number = row["line"].rpartition(":")
        if not re.search(r"\.txt(\.gz)?$", file, re.I) or number != "1" or data.row_type != "text":
            rows.append(row)
            continue
        lines = enumerate(LINE_END.split(row["text"]), 1)
        rows += [{"text": line, "line": f"{file}:{n}"} for n, line in lines if line.strip()]
    return data._replace(rows=rows)


def load_text(path_or_name, split, row_types=("text",)):
    """The rows of a split that is used as raw text. Raises DataError for other row types."""
    data = load(path_or_name, split)
    if data.row_type not in row_types:
        raise DataError(f"{path_or_name} holds {data.row_type} rows; raw text is needed here, for example "
                        "toy/corpus or a .txt file")
    return data.rows


def _load_toy(name, split, keep):
    from data import toy                                # here: reading files needs no toy world
    if name not in toy.NAMES:
        raise DataError(f"{printable(name)} is no data set of the toy world; there are "
                        f"{', '.join(toy.NAMES)}")
    records = []
    for part in [split] if split else SPLITS:
        for number, row in enumerate(toy.rows(name, part), 1):
            records.append((f"{name} {part}:{number}", row))
    return _convert(records, f"{name} {split or ''}".strip(), keep)


def _files_of(folder):
    """{split: file} of a folder. Raises DataError for two files of one split, and for none at all."""
    found = {}
    for split, stems in SPLITS.items():
        candidates = [folder / (stem + suffix + packed) for stem in stems for suffix in SUFFIXES
                      for packed in ("", ".gz")]
        files = [path for path in candidates if path.is_file()]
        if len(files) > 1:
            raise DataError(f"{folder} holds both {files[0].name} and {files[1].name}; keep one")
        if files:
            found[split] = files[0]
    if not found:
        raise DataError(f"{folder} holds no train, valid or test file ({' '.join(SUFFIXES)})")
    return found


def _load_folder(path, split, keep):
    files = _files_of(path)
    if split is None:
        return _concatenate(path, [load(file, keep=keep) for file in files.values()])
    if split == "test" and "test" not in files:
        data = _load_folder(path, "valid", keep)
        return data._replace(source=f"{data.source}, because there is no test file")
    if split in files and ("valid" in files or split == "test"):
        return load(files[split], keep=keep)
    if "train" not in files:
        names = ", ".join(file.name for file in files.values())
        raise DataError(f"{path} has no {split} file; it has {names}")
    return _part(load(files["train"], keep=keep), split, {8: "valid"})


def _concatenate(path, parts):
    """All files of a folder as one Data."""
    row_types = [part.row_type for part in parts]
    if len(set(row_types)) > 1:
        raise DataError(f"{path} holds files of different row types: {', '.join(row_types)}")
    dropped = {}
    for part in parts:
        for reason, places in part.dropped.items():
            dropped[reason] = dropped.get(reason, []) + places
    all_rows = [row for part in parts for row in part.rows]
    return parts[0]._replace(rows=all_rows, source=str(path), dropped=dropped)
