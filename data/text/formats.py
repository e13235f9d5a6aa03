"""data/text/formats.py: recognise the format of a data file by its keys; load files and folders.

    file -> records (readers.py) -> rows of one row type (converters.py) -> Data

Each entry of FORMATS names the sets of keys that identify the format, other keys that it reads, the row type
that it becomes, and the function that converts a record. The first record decides for the file: a later
record in another format is an error, and so is a record with the keys of two formats, unless one repeats the
texts of the other (a conversation that is also rendered as "text"): then the later one in FORMATS is read.
Keys that are not read are named with the format; one that is nearly the key of another format ("labels") is
an error. For evaluation, "references" (or "outputs") may replace the last answer of a conversation. Records
that train nothing are dropped and counted; none left is an error. Every row gets a key "line" with its
location, such as "data.jsonl:17".

Splits. A folder holds train, valid and test files. A single file is split 80/10/10 by content (splits.py). A
folder without a valid file gives 10 % of train to it; a folder without a test file is tested on valid. A data
set with too few rows to split is used whole in every split. Data.source says which of these happened.

Public: load, load_splits, load_text, Data, FORMATS, SPLITS, prompt_key, row_json, label_names,
duplicates, leaks
"""
import collections
import difflib
import functools
import pathlib
import re
import typing

from data.runtime import cache
from data.runtime.files import DataError, UserError, check_path, printable
from data.text import converters, messages
from data.text.readers import SUFFIXES, file_type, read_records
from data.text.splits import duplicates, label_names, leaks, prompt_key, row_json, split_rows    # noqa: F401

# split: the names, without suffix, of its file in a folder
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}


BESIDE = "system system_prompt " + " ".join(messages.UNSUPPORTED)      # what a conversation may have beside it
ANSWERS = "references outputs"
VOTES = "votes_for votes_against"
QUESTION = f"{BESIDE} {ANSWERS} instruction input history"


class Format(typing.NamedTuple):
    name: str
    row_type: str
    convert: typing.Callable                            # (record with these keys only, location) -> row
    key_sets: tuple                                     # any one of them identifies the format
    optional: str = ""                                  # keys that are read, too
    fallback: bool = False                              # raw text aside, any other format comes before it

    @property
    def reads(self):
        """All its keys."""
        return set(" ".join((*self.key_sets, self.optional)).split())


FORMATS = {format.name: format for format in (
    Format("prompt", "prompt", converters.prompt, ("prompt",), BESIDE),
    Format("text", "text", converters.text, ("text",)),
    Format("text/label", "label", converters.label, ("text label",)),
    Format("tokens/tags", "tags", converters.tags, ("tokens tags",)),
    Format("prompt/completion", "chat", converters.completion,
           ("prompt completion", "prompt response", "prompt references"), f"{BESIDE} {ANSWERS}"),
    Format("Alpaca", "chat", converters.instruction, ("instruction output", "input output",
                                                      "instruction outputs", "input outputs"), QUESTION),
    Format("Dolly", "chat", converters.instruction, ("instruction response",), f"{QUESTION} context", True),
    Format("question/answer", "chat", converters.instruction,
           ("question answer", "question response", "query response"), f"{QUESTION} context", True),
    Format("messages", "chat", converters.conversation, ("messages",), f"{BESIDE} {ANSWERS}"),
    Format("ShareGPT", "chat", converters.conversation, ("conversations",), f"{BESIDE} {ANSWERS}"),
    Format("prompt/chosen/rejected", "pairs", converters.pair,
           ("prompt chosen rejected", "question chosen rejected"), f"{BESIDE} {VOTES}"),
    Format("Alpaca preference", "pairs", converters.pair, ("instruction chosen rejected",),
           f"{BESIDE} {VOTES} input history"),
    Format("ShareGPT preference", "pairs", converters.pair, ("conversations chosen rejected",),
           f"{BESIDE} {VOTES}"),
    Format("chosen/rejected", "pairs", converters.whole_pair, ("chosen rejected",), f"{BESIDE} {VOTES}"),
    Format("OpenAI preference", "pairs", converters.openai_pair,
           ("input preferred_output non_preferred_output",), f"{BESIDE} {VOTES}"),
    Format("prompt/responses/rank", "ranked", converters.ranking, ("prompt responses rank",), BESIDE),
)}
KEYS = sorted({key for format in FORMATS.values() for key in " ".join(format.key_sets).split()})
READ = set().union(*(format.reads for format in FORMATS.values()))


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


# ---- formats -----------------------------------------------------------------------------------------------
@functools.lru_cache
def _matching_formats(keys):
    """((format name, keys), ...) of the formats whose keys are all present, one key set for each.

    A key set that is part of a larger match does not count: prompt + completion is not also a "prompt" row.
    """
    matches = []
    for format in FORMATS.values():
        for key_set in format.key_sets:
            needed = key_set.split()
            if keys.issuperset(needed):
                matches.append((format.name, needed))
    largest = {}
    for name, needed in matches:
        if not any(set(needed) < set(other) for _, other in matches):
            largest.setdefault(name, needed)
    if any(not FORMATS[name].fallback and name != "text" for name in largest):
        largest = {name: needed for name, needed in largest.items() if not FORMATS[name].fallback}
    return tuple(largest.items())


@functools.lru_cache
def _near_miss(keys):
    """(key, what it should be) of a key that is misspelt and would decide the format, or None."""
    exact = {}                                          # other case, blanks or marks: surely the same word
    similar = {}
    for key in sorted(keys - READ):
        word = re.sub(r"\W", "", key.lower()).strip("_")
        if word in READ:
            exact[key] = word
        elif word.isalpha():                            # "response_2" is no misspelt "response"
            similar.update((key, known) for known in difflib.get_close_matches(word, KEYS, 1, 0.8))
    for meant in [{key: word} for key, word in {**exact, **similar}.items()] + [{**exact, **similar}]:
        names = set(meant.values())
        if len(names - keys) < len(meant):              # the right name is there, too
            continue
        fits = _matching_formats(keys - set(meant) | names)
        if (meant.keys() <= exact.keys() or len(fits) == 1) and any(
                names & FORMATS[name].reads for name, _ in fits):
            return next(iter(meant.items()))
    return None


def _texts(record, keys):
    """All strings under some keys, blanks around them removed, without names of roles."""
    found = []
    waiting = [record[key] for key in keys]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [inner for key, inner in value.items() if key not in ("role", "from")]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and value.strip():
            found.append(value.strip())
    return found


def _repeats(record, keys, others):
    """Whether the texts under one of two lists of keys are texts under the other, or are all in a single one."""
    ours = _texts(record, set(keys) - set(others))
    theirs = _texts(record, set(others) - set(keys))
    for some, whole in ((ours, theirs), (theirs, ours)):
        rendered = len(whole) == 1 and all(text in whole[0] for text in some)
        if some and (set(some) <= set(whole) or rendered):
            return True
    return False


def recognise(record, location):
    """(name, keys) of the one format that a record is in; (None, []) if none. Raises DataError for two."""
    replies = record.keys() & {"completion", "response"}
    if "kto_tag" in record or "label" in record and (
            "completion" in replies or replies and isinstance(record["label"], bool)):
        raise DataError(f"{location}: unpaired thumbs up or down (KTO) are not supported; "
                        "give prompt, chosen and rejected")
    matches = _matching_formats(frozenset(record))
    if not matches:
        return None, []
    name, keys = matches[-1]
    for other, other_keys in matches[:-1]:
        if not _repeats(record, keys, other_keys):
            raise DataError(f"{location}: the keys of two formats, {other} and {name}; keep those of one")
    return name, keys


def _unknown_format(record, location, source):
    """The error for a record whose keys fit no format, with a likely remedy."""
    known = " | ".join(dict.fromkeys(format.key_sets[0].replace(" ", "+") for format in FORMATS.values()))
    keys = ", ".join(map(printable, list(record)[:8])) or "(none)"
    remedy = ""
    if len(record) == 1 and ";" in keys:
        remedy = "; the columns of a .csv are separated by commas"
    elif file_type(pathlib.Path(source)) in (".csv", ".tsv"):
        remedy = "; rename the columns in the first line"
    return DataError(f"{location}: no known format has the keys {keys}; known are {known}{remedy}")


def _other_format(record, location, name, first):
    """The error for a record in another format than the file's first: first = (name, keys, location)."""
    first_name, first_keys, first_location = first
    missing = [key for key in first_keys if key not in record]
    fault = f'"{missing[0]}" is missing' if missing else f"the keys of {name}"
    return DataError(f"{location}: {fault}, in a file of {first_name} rows (see {first_location}); "
                     "all rows of a file have one format")


def _echo(name, unread):
    """The name of a format, and the keys that are not read."""
    if not unread:
        return name
    names = ", ".join(printable(key, 40) for key in sorted(unread)[:8])
    more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
    return f"{name} (not read: {names}{more})"


def _convert(records, source):
    """(location, record) pairs -> Data. The first record fixes the format."""
    converted = []
    first = None
    dropped = collections.defaultdict(list)
    unread = set()
    for location, record in records:
        name, keys = recognise(record, location)
        near = _near_miss(frozenset(record))
        if near:
            raise DataError(f'{location}: the key "{printable(near[0])}" is not read; "{near[1]}" is meant, or '
                            "another name is needed; rename it")
        if first is None:
            if name is None:
                raise _unknown_format(record, location, source)
            first = (name, keys, location)
        if name != first[0]:
            raise _other_format(record, location, name, first)
        format = FORMATS[name]
        known = {key: record[key] for key in (*keys, *format.optional.split()) if key in record}
        unread |= record.keys() - known.keys()
        if format.optional:
            messages.check_supported(known, location)
        known = messages.decode_lists(known, location)
        for key, value in known.items():
            unread |= messages.unread_keys(value, key)
        try:
            row = format.convert(known, location)
        except converters.SkipRow as reason:
            dropped[str(reason)].append(location)
            continue
        row["line"] = location
        converted.append(row)
    if not converted:
        reasons = ", ".join(f"{len(places)} {reason} ({places[0]} is the first)"
                            for reason, places in dropped.items())
        raise DataError(f"0 usable examples in {source}: {reasons or 'it holds no rows'}")
    return Data(converted, FORMATS[first[0]].row_type, source, _echo(first[0], unread), dict(dropped))


# ---- loading -----------------------------------------------------------------------------------------------
def _part(data, split, held_out):
    rows_of_split = split_rows(data.rows, held_out)[split]
    whole = rows_of_split is data.rows
    part = "all of it, too few rows to split" if whole else f"its {split} part"
    return data._replace(rows=rows_of_split, source=f"{data.source} ({part})")


def load(path_or_name, split=None):
    """Data of a file, a folder, or a data set of the toy world: one split of it, or (None) all of it.

    Raises DataError for what cannot be read or interpreted, UserError for an unknown split.
    """
    if split not in (None, *SPLITS):
        raise UserError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
    return _load(path_or_name, [split])[0]


def _load(path_or_name, splits):
    """[Data of each of `splits`]; a file that holds all of them is read once."""
    name, path = str(path_or_name), pathlib.Path(path_or_name)
    check_path(name)
    if name.split("/")[0] == "toy":                     # a folder of that name is ./toy
        return [_load_toy(name, split) for split in splits]
    try:
        if not path.exists():
            path = cache.find_data(name) or path
        if path.is_dir():
            return [_load_folder(path, split) for split in splits]
        if not path.exists() and name in cache.DATASETS:
            raise DataError(f"{name} is not fetched yet; run python data/fetch.py {name}")
        if not path.is_file():
            fault = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise DataError(f"{name} {fault}; data is a file ({' '.join(SUFFIXES)}), a folder with "
                            "train.jsonl, a fetched data set, or a name such as toy/sentiment")
        data = _convert(read_records(path), name)
    except OSError as e:
        raise DataError(f"{name} cannot be read ({e.strerror or e})") from e
    return [data if split is None else _part(data, split, {8: "valid", 9: "test"}) for split in splits]


def load_splits(path_or_name):
    """{"train", "valid", "test": Data}. Raises DataError when their row types differ."""
    data = dict(zip(SPLITS, _load(path_or_name, SPLITS)))
    train = data["train"]
    for part in data.values():
        if part.row_type != train.row_type:
            raise DataError(f"{part.source} holds {part.row_type} rows, but {train.source} {train.row_type} "
                            "rows; all splits of a data set have one row type")
    return data


def load_text(path_or_name, split, row_types=("text",)):
    """The rows of a split that is used as raw text. Raises DataError for other row types."""
    data = load(path_or_name, split)
    if data.row_type not in row_types:
        raise DataError(f"{path_or_name} holds {data.row_type} rows; raw text is needed here, for example "
                        "toy/corpus or a .txt file")
    return data.rows


def _load_toy(name, split):
    from data import toy                                # here: reading files needs no toy world
    if name not in toy.NAMES:
        raise DataError(f"{name} is no data set of the toy world; there are {', '.join(toy.NAMES)}")
    records = []
    for part in [split] if split else SPLITS:
        for number, row in enumerate(toy.rows(name, part), 1):
            records.append((f"{name} {part}:{number}", row))
    return _convert(records, f"{name} {split or ''}".strip())


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


def _load_folder(path, split):
    files = _files_of(path)
    if split is None:
        return _concatenate(path, [load(file) for file in files.values()])
    if split == "test" and "test" not in files:
        data = _load_folder(path, "valid")
        return data._replace(source=f"{data.source}, because there is no test file")
    if split in files and ("valid" in files or split == "test"):
        return load(files[split])
    if "train" not in files:
        names = ", ".join(file.name for file in files.values())
        raise DataError(f"{path} has no {split} file; it has {names}")
    return _part(load(files["train"]), split, {8: "valid"})


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
