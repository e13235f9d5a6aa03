"""data/text/splits.py: what identifies a row, and which split of a single file a row belongs to.

    tenth of a row = blake2b(key(row)) mod 10           8 -> valid, 9 -> test, all others -> train

The key is the *prompt key*: the row without its last answer. Duplicates, and other answers to the same
prompt, therefore stay in one split, and adding rows to a file moves no row to another split. If that leaves
a split empty (all prompts are equal), the key is the whole row; if a split is still empty (a handful of
rows), every split is the whole file. A .txt file is one long row; it is cut in order, at line ends.

Public: split_rows, prompt_key, row_json, label_names, duplicates, leaks, outvoted
"""
import hashlib
import json
import re

LINE_END = re.compile(r"\r\n?|\n")


def row_json(row):
    """A row without its location, as JSON: equal for equal rows."""
    return json.dumps({key: value for key, value in row.items() if key != "line"}, sort_keys=True)


def _content_json(row):
    """row_json of what every task reads of a row: a file has the same splits for all tasks."""
    return row_json({key: value for key, value in row.items() if key != "record"})


def prompt_key(row):
    """What must not be in two splits: the row without its last answer; all of it if the prompt is empty."""
    if "text" in row:
        return json.dumps(row["text"])
    if "tokens" in row:
        return json.dumps(row["tokens"])
    messages = row["prompt"] if "prompt" in row else row["messages"][:-1]
    if any(message["content"].strip() for message in messages):
        return json.dumps(messages)
    return _content_json(row)


def label_names(rows):
    """The labels, or tags, of rows, sorted, as a tuple; O (outside of entities) comes first."""
    found = set()
    for row in rows:
        found.update(row.get("tags", [row.get("label")]))
    return tuple(sorted(found, key=lambda name: (name != "O", name)))


def duplicates(rows):
    """How many rows repeat an earlier one."""
    return len(rows) - len({row_json(row) for row in rows})


def leaks(train, other):
    """How many rows of `other` have the prompt key of a row of `train`."""
    known = {prompt_key(row) for row in train}
    return sum(prompt_key(row) in known for row in other)


def outvoted(rows):
    """The rows of pairs with more votes against `chosen` than for it."""
    return [row for row in rows if row.get("votes_against", 0) > row.get("votes_for", 1)]


def split_rows(rows, held_out):
    """{split: rows}. held_out {tenth: split}: which tenths (0-9) of the hash range are not train's."""
    if rows[0]["line"].lower().endswith((".txt:1", ".txt.gz:1")):
        parts = _split_text(rows[0], held_out)
        if all(part[0]["text"].strip() for part in parts.values()):
            return parts
        return dict.fromkeys(parts, rows)
    for key in (prompt_key, _content_json):
        parts = {"train": []}
        for split in held_out.values():
            parts[split] = []
        for row in rows:
            digest = hashlib.blake2b(key(row).encode(), digest_size=8).digest()
            tenth = int.from_bytes(digest, "big") % 10
            parts[held_out.get(tenth, "train")].append(row)
        if all(parts.values()):
            return parts
    return dict.fromkeys(parts, rows)


def _split_text(row, held_out):
    """One long text in order: train first, then a tenth for each other split, cut at a nearby line end."""
    text = row["text"]
    starts = [0]
    for tenths in range(10 - len(held_out), 10):
        position = len(text) * tenths // 10
        line_end = LINE_END.search(text, max(position - 1, 0), position + len(text) // 20)
        starts.append(line_end.end() if line_end else position)
    ends = [*starts[1:], len(text)]
    parts = {}
    for split, start, end in zip(("train", *held_out.values()), starts, ends):
        parts[split] = [{**row, "text": text[start:end]}]
    return parts
