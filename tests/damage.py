"""tests/damage.py: a file of a data set, run, model or adapter -> the file with one fault.

    damage(path, rng) -> Damage(what, do, noticed)        do(path of a copy) does it

A fault is a flipped bit, bytes that are missing, added or doubled, an empty file, a folder in its place, or
in JSON a value of another kind or a missing key. `noticed`: no reader can take it for sound (a header of
safetensors, an archive of torch, a JSON value of another type, but null); a bit of a weight it can.

Public: damage, Damage, ROWS, write_data_files
"""
import csv
import gzip
import io
import json
import os
import pathlib
from typing import Callable, NamedTuple

ODD = [None, [], {}, "", "x", True, False, -1, 0, 1, 3, 1.5, 10 ** 30, -1e308, "x" * 10000, "a\0b", "\ud800",
       "../..", [None], [[[1]]], {"a": {"b": 1}}, [{}], "nan"]
ODD_BYTES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b'"', b"{", b"]", b",", b"9" * 400, b"[" * 100000,
             b"NaN", b"\\ud800", b"\n\n", b"e999", "\u2028".encode())


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


# a record of each format, {} filled with a pair of letters, and the row type that it becomes
ROWS = {
    "text": ("text", {"text": "abcd {} " * 30}),
    "label": ("label", {"text": "{} b", "label": "x"}),
    "tags": ("tags", {"tokens": ["{}", "b", "c"], "tags": ["B-X", "I-X", "O"]}),
    "completion": ("chat", {"prompt": "{}", "completion": "b", "system": "s"}),
    "messages": ("chat", {"messages": [turn("system", "s"), turn("user", "{}"),
                                       turn("assistant", "b", weight=0), turn("user", "c"),
                                       turn("assistant", "d", weight=1)]}),
    "sharegpt": ("chat", {"conversations": [{"from": "human", "value": "{}"},
                                            {"from": "gpt", "value": "b"}]}),
    "alpaca": ("chat", {"instruction": "{}", "input": "b", "output": "c", "history": [["d", "e"]]}),
    "references": ("chat", {"prompt": "{}", "references": ["b", "c"]}),
    "pairs": ("pairs", {"prompt": "{}", "chosen": "b", "rejected": "c", "votes_for": 3, "votes_against": 1}),
    "hh": ("pairs", {"chosen": "\n\nHuman: {}\n\nAssistant: b", "rejected": "\n\nHuman: {}\n\nAssistant: c"}),
    "openai": ("pairs", {"input": {"messages": [turn("user", "{}")]},
                         "preferred_output": [turn("assistant", "b")],
                         "non_preferred_output": [turn("assistant", "c")]}),
    "ranked": ("ranked", {"prompt": "{}", "responses": ["b", "c", "d"], "rank": [1, 2, 3]}),
    "prompt": ("prompt", {"prompt": "{}"})}


class Damage(NamedTuple):
    what: str
    do: Callable
    noticed: bool


def damage(path, rng):
    """One fault for the file at `path`, which is left alone."""
    content = path.read_bytes()
    if rng.random() < 0.04:
        return Damage("is a folder", to_folder, False)
    if rng.random() < 0.04:
        return Damage("is missing", pathlib.Path.unlink, False)
    if path.suffix in (".json", ".jsonl") and content and rng.random() < 0.7:
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        i = rng.randrange(len(lines))
        what, value, noticed = damage_json(json.loads(lines[i]), rng)
        lines[i] = json.dumps(value).encode()
        new = b"\n".join(lines) + b"\n"
        return Damage(f"line {i + 1}: {what}", lambda file: file.write_bytes(new),
                      noticed and path.suffix == ".json")
    packed = path.suffix == ".gz"
    content = gzip.decompress(content) if packed and rng.random() < 0.5 else content
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    what, new = damage_bytes(content, rng, header)
    return Damage(what, lambda file: file.write_bytes(new), path.suffix in (".safetensors", ".pt"))


def to_folder(file):
    file.unlink()
    file.mkdir()


def nodes(value, path=()):
    """The paths to all values inside of a JSON value, at most 200 of a list or object."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inner)[:200]:
        yield (*path, key)
        yield from nodes(item, (*path, key))


def json_type(value):
    return "number" if type(value) in (int, float) else type(value).__name__


def damage_json(value, rng):
    """(what was done, the value with it, whether a part of it now has another type)"""
    paths = list(nodes(value))
    odd = rng.choice(ODD)
    if not paths or rng.random() < 0.05:
        return f"all of it is {odd!r:.20}", odd, json_type(odd) != json_type(value)
    path = rng.choice(paths)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    where = ".".join(map(str, path))
    old = parent[path[-1]]
    if rng.random() < 0.15:
        del parent[path[-1]]
        return f"without {where}", value, False
    parent[path[-1]] = odd
    return f"{where} is {odd!r:.20}", value, odd is not None and json_type(odd) != json_type(old)


def damage_bytes(content, rng, end):
    """(what was done, the bytes with it), somewhere before `end`"""
    way = rng.choice(("flip", "flip", "cut", "insert", "remove", "repeat", "empty"))
    at = rng.randrange(max(1, min(end, len(content))))
    if way == "flip" and content:
        bit = rng.randrange(8)
        flipped = bytes([content[at] ^ 1 << bit])
        return f"bit {bit} of byte {at} flipped", content[:at] + flipped + content[at + 1:]
    if way == "cut":
        return f"cut at byte {at}", content[:at]
    if way == "insert":
        odd = rng.choice(ODD_BYTES)
        return f"{odd[:8]!r} inserted at byte {at}", content[:at] + odd + content[at:]
    length = rng.randint(1, 200)
    if way == "remove":
        return f"{length} bytes removed at {at}", content[:at] + content[at + length:]
    if way == "repeat":
        return f"{length} bytes doubled at {at}", content[:at + length] + content[at:]
    return "empty", b""


def write_data_files(folder, pairs):
    """folder/NAME.SUFFIX for every format of ROWS and every suffix that can hold it."""
    folder.mkdir()
    for name, (_, record) in ROWS.items():
        rows = [json.loads(json.dumps(record).replace("{}", pair)) for pair in pairs]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
        (folder / f"{name}.json").write_text(json.dumps(rows))
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
        if all(isinstance(value, str) for value in record.values()):
            for suffix, dialect in (("csv", "excel"), ("tsv", "excel-tab")):
                text = io.StringIO()
                writer = csv.DictWriter(text, record, dialect=dialect)
                writer.writeheader()
                writer.writerows(rows)
                (folder / f"{name}.{suffix}").write_text(text.getvalue())
    (folder / "text.txt").write_text("abcd efgh\n" * 200)
