"""data/text/formats.py: other people's files, as lists of rows of seven kinds.

    kind    a row, after reading                            read from rows with the keys
    text    {"text"}                                        text (a .txt file is one such row)
    label   {"text", "label"}                               text + label
    tags    {"tokens", "tags"}                              tokens + tags
    chat    {"messages": [{"role", "content", "weight"?}],  prompt + completion; messages (OpenAI);
             "references"?: [str]}                          instruction, input + output (Alpaca);
                                                            conversations (ShareGPT)
    pairs   {"prompt": messages, "chosen", "rejected",      prompt + chosen + rejected; or with instruction,
             "votes_for"?, "votes_against"?}                conversations; chosen + rejected (HH, TRL);
                                                            input + preferred_output + non_preferred_output
    ranked  {"prompt": messages, "responses", "rank"}       prompt + responses + rank (smallest is best)
    prompt  {"prompt": messages}                            prompt

and "line": "file:17" in each. A format is recognised by its keys. The first row fixes it for the file; a row
with the keys of two formats is an error. For evaluation, "references" (or "outputs") may replace the last
answer. Rows that teach nothing (data/text/readers.py) are dropped and counted; when none is left, that is an error.

Splits. A folder holds train, valid and test files. A single file is dealt 80/10/10 by a hash of each row's
*question* (all but its last answer): neither duplicates nor other answers to one prompt ever straddle, and a
new row moves no old one. Should that leave a split empty (all prompts alike), whole rows are hashed; should
that too (a handful of rows), every split is the whole file. A folder without a valid file deals 10 % of train
to it; one without a test file is tested on valid. A .txt is cut in order, at line ends. `source` says so.

Public: load, Data, question, names, duplicates, leaks
"""
import collections
import functools
import hashlib
import json
import pathlib
import typing

from data.text import readers as read
from data.runtime.files import DataError, UserError
from data.text.readers import SUFFIXES, records

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
FORMS = {                                               # name: kind, reader, the sets of keys that show it
    "text": ("text", read.text, "text"),
    "text/label": ("label", read.label, "text label"),
    "tokens/tags": ("tags", read.tags, "tokens tags"),
    "prompt/completion": ("chat", read.completion, "prompt completion", "prompt references"),
    "messages": ("chat", read.conversation, "messages"),
    "ShareGPT": ("chat", read.conversation, "conversations"),
    "Alpaca": ("chat", read.alpaca, "instruction output", "input output",
               "instruction outputs", "input outputs"),
    "prompt/chosen/rejected": ("pairs", read.pair, "prompt chosen rejected"),
    "Alpaca preference": ("pairs", read.pair, "instruction chosen rejected"),
    "ShareGPT preference": ("pairs", read.pair, "conversations chosen rejected"),
    "chosen/rejected": ("pairs", read.whole_pair, "chosen rejected"),
    "OpenAI preference": ("pairs", read.openai_pair, "input preferred_output non_preferred_output"),
    "prompt/responses/rank": ("ranked", read.ranking, "prompt responses rank"),
    "prompt": ("prompt", read.prompt, "prompt"),
}
OPTIONAL = "input system history references outputs tools functions votes_for votes_against"


class Data(typing.NamedTuple):
    rows: list
    kind: str
    source: str                                         # which file, and which part of it: for people
    form: str                                           # the format recognised, and the keys not read
    dropped: dict                                       # reason -> how many rows of the file teach nothing


@functools.lru_cache
def _seen(keys):
    """(name, its keys) of the formats whose keys are all there; prompt+completion is not also a prompt."""
    forms = [(name, some.split()) for name, form in FORMS.items() for some in form[2:]]
    seen = [(name, some) for name, some in forms if keys >= set(some)]
    return [(name, some) for name, some in seen if not any(set(some) < set(more) for _, more in seen)]


def recognise(record, at):
    """(name, keys) of the one format that a record is in, (None, []) if it is in none."""
    if "kto_tag" in record or {"completion", "label"} <= record.keys():
        raise DataError(f"{at}: thumbs up or down (KTO) are not supported; give prompt, chosen and rejected")
    seen = _seen(frozenset(record))
    names = sorted({name for name, _ in seen})
    if len(names) > 1:
        raise DataError(f"{at}: the keys of two formats, {names[0]} and {names[1]}; keep those of one")
    return seen[0] if seen else (None, [])


def _interpret(found, source):
    """(place, record) pairs -> Data. The first one fixes the format, the others must agree."""
    out, first, dropped, unread = [], None, collections.Counter(), set()
    for at, record in found:
        name, keys = recognise(record, at)
        if first is None and name is None:
            known = " | ".join(dict.fromkeys(form[2].replace(" ", "+") for form in FORMS.values()))
            keys = ", ".join(list(record)[:8]) or "(none)"
            fix = ("; columns are separated by commas here" if len(record) == 1 and ";" in keys else
                   "; rename them in the first line" if str(source).endswith((".csv", ".tsv")) else "")
            raise DataError(f"{at}: no format has the keys {keys}; there are {known}{fix}")
        first = first or (name, keys, at)
        if name != first[0]:
            missing = [key for key in first[1] if key not in record]
            fault = f'no "{missing[0]}"' if missing else f"the keys of {name}"
            raise DataError(f"{at}: {fault}, in a file of {first[0]} rows (so says {first[2]}); "
                            "a file has one format")
        unread |= record.keys() - set(" ".join((OPTIONAL, *FORMS[name][2:])).split())
        try:
            out.append({**FORMS[name][1](record, at), "line": at})
        except read.Useless as reason:
            dropped[str(reason)] += 1
    if not out:
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "it holds no rows"
        raise DataError(f"0 usable examples in {source}: {why}")
    form = first[0] + f" (not read: {', '.join(sorted(unread)[:8])})" * bool(unread)
    return Data(out, FORMS[first[0]][0], source, form, dict(dropped))


# ---- splits ------------------------------------------------------------------------------------------------
def whole(row):
    return json.dumps({key: value for key, value in row.items() if key != "line"}, sort_keys=True)


def question(row):
    """What must not be in two splits: the row without its last answer; all of it when nothing is asked."""
    if "text" in row or "tokens" in row:
        return json.dumps(row.get("text", row.get("tokens")))
    turns = row["prompt"] if "prompt" in row else row["messages"][:-1]
    return json.dumps(turns) if any(m["content"].strip() for m in turns) else whole(row)


def names(rows):
    """The labels, or tags, of some rows in the order a model gets them; O, no name, comes first."""
    found = {name for row in rows for name in row.get("tags", [row.get("label")])}
    return tuple(sorted(found, key=lambda name: (name != "O", name)))


def duplicates(rows):
    """How many rows repeat an earlier one."""
    return len(rows) - len(set(map(whole, rows)))


def leaks(train, other):
    """How many rows of `other` ask what `train` answers."""
    known = set(map(question, train))
    return sum(question(row) in known for row in other)


def _deal(data, held):
    """{split: rows}: each split in `held` gets its tenth of the hash, train gets the rest."""
    if data.rows[0]["line"].endswith(".txt:1"):
        parts = _cut(data.rows[0], held)
        whole_text = not all(rows[0]["text"].strip() for rows in parts.values())
        return dict.fromkeys(parts, data.rows) if whole_text else parts
    for key in (question, whole):
        parts = {"train": [], **{split: [] for split in held.values()}}
        for row in data.rows:
            tenth = int.from_bytes(hashlib.blake2b(key(row).encode(), digest_size=8).digest(), "big") % 10
            parts[held.get(tenth, "train")].append(row)
        if all(parts.values()):
            return parts
    return dict.fromkeys(parts, data.rows)


def _cut(row, held):
    """One long text in order: train, and a tenth for each split in `held`; cut at a near line end."""
    text, starts = row["text"], [0]
    for tenths in range(10 - len(held), 10):
        at = len(text) * tenths // 10
        starts.append(text.find("\n", max(at - 1, 0), at + len(text) // 20) + 1 or at)
    return {split: [{**row, "text": text[a:b]}] for split, a, b in
            zip(("train", *held.values()), starts, [*starts[1:], len(text)])}


def _files(folder):
    """{split: file} of a folder."""
    found = {}
    for split, stems in SPLITS.items():
        here = [p for stem in stems for suffix in SUFFIXES if (p := folder / (stem + suffix)).is_file()]
        if len(here) > 1:
            raise DataError(f"{folder} holds both {here[0].name} and {here[1].name}; keep one")
        found.update((split, path) for path in here)
    if not found:
        raise DataError(f"{folder} holds no train, valid or test file ({' '.join(SUFFIXES)})")
    return found


def load(path_or_name, split=None):
    """A file, a folder, or a name of the toy world: one split of it, or (None) all of it."""
    name, path = str(path_or_name), pathlib.Path(path_or_name)
    if split not in (None, *SPLITS):
        raise UserError(f"{split!r} is no split; there are {', '.join(SPLITS)}")
    if name.split("/")[0] == "toy":                     # a folder of that name is ./toy
        return _toy(name, split)
    try:
        if path.is_dir():
            return _folder(path, split)
        if not path.is_file():
            fault = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise DataError(f"{name} {fault}; data is a file ({' '.join(SUFFIXES)}), a folder with "
                            "train.jsonl, or a name such as toy/sentiment")
        data = _interpret(records(path), name)
    except OSError as e:
        raise DataError(f"{name} cannot be read ({e.strerror or e})") from e
    return data if split is None else _part(data, split, {8: "valid", 9: "test"})


def splits(path_or_name):
    """{split: Data} of all three, which hold rows of one kind."""
    data = {split: load(path_or_name, split) for split in SPLITS}
    for some in data.values():
        if some.kind != data["train"].kind:
            raise DataError(f"{some.source} holds {some.kind} rows, but {data['train'].source} "
                            f"{data['train'].kind} rows; the splits of one data set hold rows of one kind")
    return data


def plain(path_or_name, split, kinds=("text",)):
    """Rows of raw text, or of what else can be read as one."""
    data = load(path_or_name, split)
    if data.kind not in kinds:
        raise DataError(f"{path_or_name} holds {data.kind} rows; raw text is wanted here, as toy/corpus or a "
                        ".txt")
    return data.rows


def _part(data, split, held):
    rows = _deal(data, held)[split]
    part = "all of it, too few rows to split" if rows is data.rows else f"its {split} part"
    return data._replace(rows=rows, source=f"{data.source} ({part})")


def _toy(name, split):
    from data import toy                                # here: reading files needs no toy world
    if name not in toy.NAMES:
        raise DataError(f"{name} is no part of the toy world; there are {', '.join(toy.NAMES)}")
    found = ((f"{name} {s}:{n}", row) for s in ([split] if split else SPLITS)
             for n, row in enumerate(toy.rows(name, s), 1))
    return _interpret(found, f"{name} {split or ''}".strip())


def _folder(path, split):
    files = _files(path)
    if split is None:
        every = [load(file) for file in files.values()]
        if len({data.kind for data in every}) > 1:
            raise DataError(f"{path} holds files of several kinds: {', '.join(data.kind for data in every)}")
        rows = [row for data in every for row in data.rows]
        dropped = sum((collections.Counter(data.dropped) for data in every), collections.Counter())
        return every[0]._replace(rows=rows, source=str(path), dropped=dict(dropped))
    if split == "test" and "test" not in files:
        data = _folder(path, "valid")
        return data._replace(source=f"{data.source}, for want of a test file")
    if split in files and ("valid" in files or split == "test"):
        return load(files[split])
    if "train" not in files:
        raise DataError(f"{path} has no {split} file; it has {', '.join(p.name for p in files.values())}")
    return _part(load(files["train"]), split, {8: "valid"})
