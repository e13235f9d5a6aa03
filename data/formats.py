"""data/formats.py: other people's files, as lists of rows of seven kinds.

    kind    a row, after reading                            read from rows with the keys
    text    {"text"}                                        text (a .txt file is one such row)
    label   {"text", "label"}                               text + label
    tags    {"tokens", "tags"}                              tokens + tags
    chat    {"messages": [{"role", "content", "weight"?}],  prompt + completion; messages (OpenAI); instruction and/or
             "references"?: [str]}                          input + output (Alpaca); conversations (ShareGPT)
    pairs   {"prompt": messages, "chosen", "rejected",      prompt + chosen + rejected; chosen + rejected (HH, TRL);
             "votes_for"?, "votes_against"?}                input + preferred_output + non_preferred_output (OpenAI)
    ranked  {"prompt": messages, "responses", "rank"}       prompt + responses + rank (the best has the smallest)
    prompt  {"prompt": messages}                            prompt

and "line": "file:17" in each. A format is recognised by its keys; the first row fixes it for the file, and a row with
the keys of two formats is an error. An evaluation may give "references" (or "outputs") in place of the last answer.
Rows that teach nothing (data/rows.py says which) are dropped and counted; when nothing is left, that is an error.

Splits. A folder holds train, valid and test files. A single file is dealt 80/10/10 by a hash of each row's *question*
(all but its last answer), so that neither duplicates nor other answers to one prompt straddle, and a new row moves none.
Should that leave a split empty (all prompts alike), whole rows are hashed; should that too (a handful of rows), every
split is the whole file. A folder without a valid file deals 10 % of train to it. A .txt is cut at line ends, in order.

Public: load, splits, Data, question, duplicates, leaks
"""
import collections
import hashlib
import json
import pathlib
import typing

from data import rows as read
from data.files import DataError, UserError
from data.records import SUFFIXES, records

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
FORMS = {                                               # name: kind, reader, the sets of keys that show it
    "text": ("text", read.text, "text"),
    "text/label": ("label", read.label, "text label"),
    "tokens/tags": ("tags", read.tags, "tokens tags"),
    "prompt/completion": ("chat", read.completion, "prompt completion", "prompt references"),
    "messages": ("chat", read.conversation, "messages"),
    "ShareGPT": ("chat", read.conversation, "conversations"),
    "Alpaca": ("chat", read.alpaca, "instruction output", "instruction outputs", "input output", "input outputs"),
    "prompt/chosen/rejected": ("pairs", read.pair, "prompt chosen rejected"),
    "Alpaca preference": ("pairs", read.pair, "instruction chosen rejected"),
    "ShareGPT preference": ("pairs", read.pair, "conversations chosen rejected"),
    "chosen/rejected": ("pairs", read.whole_pair, "chosen rejected"),
    "OpenAI preference": ("pairs", read.openai_pair, "input preferred_output non_preferred_output"),
    "prompt/responses/rank": ("ranked", read.ranking, "prompt responses rank"),
    "prompt": ("prompt", read.prompt, "prompt"),
}
OPTIONAL = "input system history references outputs tools functions votes_for votes_against"
READ = {key for form in FORMS.values() for keys in form[2:] for key in keys.split()} | set(OPTIONAL.split())


class Data(typing.NamedTuple):
    rows: list
    kind: str
    source: str                                         # which file, and which part of it, for people
    form: str = ""                                      # the format that was recognised, and keys that are not read
    dropped: dict = {}                                  # reason -> how many rows of the file teach nothing


def recognise(row, at):
    """The name of the one format whose keys the row has; the keys of a larger format beat those of a smaller."""
    if {"completion", "label"} <= row.keys() or "kto_tag" in row:
        raise DataError(f"{at}: single thumbs (KTO) are not supported; give pairs with prompt, chosen and rejected")
    seen = [(name, set(keys.split())) for name, form in FORMS.items() for keys in form[2:]]
    seen = [(name, keys) for name, keys in seen if keys <= row.keys()]
    names = {name for name, keys in seen if not any(keys < other for _, other in seen)}
    if len(names) > 1:
        raise DataError(f"{at}: the keys of {len(names)} formats at once ({' and '.join(sorted(names))}); "
                        "keep the keys of one")
    return names.pop() if names else None


def _interpret(found, source):
    """Records -> Data. The first one fixes the format, the others must agree."""
    first, out, dropped, keys, count = None, [], collections.Counter(), set(), 0
    for count, (at, record) in enumerate(found, 1):
        name = recognise(record, at)
        if first is None and name is None:
            raise DataError(f"{at}: no known format has the keys {', '.join(record) or '(none)'}; "
                            f"known are {', '.join(dict.fromkeys(form[2] for form in FORMS.values()))}".replace(" ", " "))
        first = first or (name, at)
        if name != first[0]:
            missing = [key for key in FORMS[first[0]][2].split() if key not in record]
            raise DataError(f"{at}: " + (f'no "{missing[0]}"' if missing else f"this is a {name} row") +
                            f"; {first[1]} made this a file of {first[0]} rows")
        keys |= record.keys() - READ
        try:
            out.append({**FORMS[name][1](record, at), "line": at})
        except read.Useless as reason:
            dropped[str(reason)] += 1
    if not out:
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "it holds no rows"
        raise DataError(f"0 usable examples in {source}: {why}")
    unread = f" (not read: {', '.join(sorted(keys))})" if keys else ""
    return Data(out, FORMS[first[0]][0], source, first[0] + unread, dict(dropped))


# ---- splits ----------------------------------------------------------------------------------------------------
def question(row):
    """What must not be in two splits: the row without its last answer (the whole row when nothing is asked)."""
    asked = row.get("text") or row.get("tokens") or row.get("prompt") or row["messages"][:-1]
    if isinstance(asked, list) and not any(m["content"].strip() for m in asked if isinstance(m, dict)):
        return whole(row) if not isinstance(asked[0] if asked else {}, str) else json.dumps(asked)
    return json.dumps(asked)


def whole(row):
    return json.dumps({key: value for key, value in row.items() if key != "line"}, sort_keys=True)


def duplicates(rows):
    """How many rows repeat an earlier one."""
    return len(rows) - len({whole(row) for row in rows})


def leaks(train, other):
    """How many rows of `other` ask what `train` has answered."""
    known = {question(row) for row in train}
    return sum(question(row) in known for row in other)


def _deal(rows, held):
    """{split: rows}; `held` names the splits that get tenths 8 and 9 of the hash, train gets the rest."""
    for key in (question, whole):
        parts = {"train": [], **{split: [] for split in held.values()}}
        for row in rows:
            tenth = int.from_bytes(hashlib.blake2b(key(row).encode(), digest_size=8).digest(), "big") % 10
            parts[held.get(tenth, "train")].append(row)
        if all(parts.values()):
            return parts
    return dict.fromkeys(parts, rows)


def _cut(row):
    """One long text, in order: the first 80 %, the next 10 %, the rest, each ending at a line end."""
    text = row["text"]
    a, b = (text.find("\n", len(text) * tenths // 10) + 1 or len(text) * tenths // 10 for tenths in (8, 9))
    return {split: [{**row, "text": piece}] if piece.strip() else []
            for split, piece in zip(SPLITS, (text[:a], text[a:b], text[b:]))}


def _files(folder):
    """{split: file} of a folder."""
    found = {}
    for split, stems in SPLITS.items():
        here = [p for stem in stems for suffix in SUFFIXES if (p := folder / (stem + suffix)).is_file()]
        if len(here) > 1:
            raise DataError(f"{folder} holds both {here[0].name} and {here[1].name}; keep one")
        found.update({split: path for path in here})
    if not found:
        raise DataError(f"{folder} holds no train, valid or test file ({' '.join(SUFFIXES)})")
    return found


def _toy(name):
    return name.split("/")[0] == "toy"


def splits(path_or_name):
    """The splits that `load` can give: a folder without a test file has none."""
    path = pathlib.Path(path_or_name)
    found = _files(path) if not _toy(str(path_or_name)) and path.is_dir() else SPLITS
    return tuple(s for s in SPLITS if s in found or s == "valid" and "train" in found)


def load(path_or_name, split=None):
    """A file, a folder, or a name of the toy world; one split of it, or (None) everything."""
    name, path = str(path_or_name), pathlib.Path(path_or_name)
    if split not in (None, *SPLITS):
        raise UserError(f"split {split!r} is none of {', '.join(SPLITS)}")
    if _toy(name):
        from data import toy                            # here: reading files needs no toy world
        found = [(f"{name}:{s}:{n}", row) for s in ([split] if split else SPLITS)
                 for n, row in enumerate(toy.rows(name, s), 1)]
        return _interpret(found, f"{name} ({split})" if split else name)
    if path.is_dir():
        return _folder(path, split)
    if not path.exists():
        raise DataError(f"{name} does not exist; data is a file ({' '.join(SUFFIXES)}), a folder with train.jsonl, "
                        "or a name such as toy or toy/sentiment")
    data = _interpret(records(path), name)
    if split is None:
        return data
    parts = _cut(data.rows[0]) if path.suffix.lower() == ".txt" else _deal(data.rows, {8: "valid", 9: "test"})
    if not parts[split]:
        raise DataError(f"0 usable examples in {name} ({split}): the text is too short to cut in three")
    part = "all of it: too few rows to split" if parts[split] is data.rows else f"{split}: {len(parts[split])} rows"
    return data._replace(rows=parts[split], source=f"{name} ({part})")


def _folder(path, split):
    files = _files(path)
    if split is None:
        every = [load(file) for file in files.values()]
        if len({data.kind for data in every}) > 1:
            raise DataError(f"{path} holds files of several kinds: {', '.join(data.kind for data in every)}")
        dropped = sum((collections.Counter(data.dropped) for data in every), collections.Counter())
        return every[0]._replace(rows=[row for data in every for row in data.rows], source=str(path), dropped=dict(dropped))
    if "valid" not in files and "train" in files and split != "test":
        data = load(files["train"])
        parts = _cut(data.rows[0]) if files["train"].suffix == ".txt" else _deal(data.rows, {8: "valid"})
        return data._replace(rows=parts[split], source=f"{files['train']} ({split} part, by hash: {path} has no valid file)")
    if split not in files:
        raise DataError(f"{path} has no {split} file; it has {', '.join(p.name for p in files.values())}")
    return load(files[split])
