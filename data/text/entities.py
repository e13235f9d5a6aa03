"""data/text/entities.py: a tag per word, read two ways: off a linear head at each word, or out of an answer in words.

    tokens  Fay  wrote  to  Luca  from  Hollowby  .           tags  B-PER  O  O  B-PER  O  B-LOC  O
    by a head     start, Fay, " wrote", " to", ...: the tag is read at the *first* token of its word
    in words      Fay wrote to Luca from Hollowby .  Which names ...?  ->  PER: Fay, PER: Luca, LOC: Hollowby

Words are joined by one space; each but the first is encoded with its space in front, as it stands inside a
text. A tag is O, or a name's kind with B- at its first word and I- behind it (Ramshaw & Marcus 1995). An
answer lists the names in their order; `heard` puts each at its first occurrence behind the one before, so
what `told` says comes back exactly, unless a name's words stand untagged before it, or hold white space. (A
comma, for any model can say it: of a rarer mark a frozen vocabulary may know nothing.) A name that is nowhere
in the text lies at no place, and counts as said and wrong.

Public: pieces, kinds, ask, told, heard, spans
"""
import re

NONE = "none"


def pieces(tokens, tokenizer, start):
    """(ids, where each word begins) of words joined by spaces; a word that has no token shows as `start`."""
    ids, first = [start], []
    for i, word in enumerate(tokens):
        first.append(len(ids))
        ids += tokenizer.encode(" " * bool(i) + word) or [start]
    return ids, first


def kinds(tags):
    """The kinds of names that some tags are about."""
    return list(dict.fromkeys(tag.partition("-")[2] for tag in tags if tag != "O"))


def ask(tags):
    return f"Which names are in this text: {' or '.join(kinds(tags))}?"


def told(tokens, tags):
    """The names of a text as an answer."""
    found = sorted(spans(tags), key=lambda span: span[1])
    return ", ".join(f"{kind}: {' '.join(tokens[a:b + 1])}" for kind, a, b in found) or NONE


def heard(answer, tokens):
    """An answer as {(kind, first, last)}, the form in which names are scored."""
    out, at = set(), 0
    for n, part in enumerate(re.split(r",\s+(?=[^\s,:]+:)", answer) if answer.strip() != NONE else ()):
        kind, _, name = part.partition(":")
        words = name.split()
        where = [i for i in range(len(tokens) - len(words) + 1) if words and tokens[i:i + len(words)] == words
                 and not any(a <= i + len(words) - 1 and i <= b for _, a, b in out)]
        i = next((i for i in where if i >= at), where[0] if where else -1 - n)
        out.add((kind.strip(), i, i + len(words) - 1 if where else i))
        at = i + len(words) if where else at
    return out


def spans(tags):
    """BIO tags of one text -> {(kind, first, last)}."""
    out, start, kind = set(), 0, None
    for i, tag in enumerate([*tags, "O"]):                      # the extra O closes an entity at the end
        mark, _, name = tag.partition("-")
        if mark == "I" and name == kind:
            continue
        if kind is not None:
            out.add((kind, start, i - 1))
        start, kind = i, name if mark in ("B", "I") else None
    return out
