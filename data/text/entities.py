"""data/text/entities.py: named entities as BIO tags, as positions for a head, and as text answers.

    tokens    Fay  wrote  to  Luca  from  Hollowby  .         tags  B-PER  O  O  B-PER  O  B-LOC  O
    head      start, "Fay", " wrote", " to", ...            predicted at the first token of each word
    text      Fay wrote to Luca from Hollowby .  Which names ...?  ->  PER: Fay, PER: Luca, LOC: Hollowby

Words are joined by one space; each but the first is encoded with its leading space, as inside a text. A tag
is O, or B-TYPE at the first word of an entity and I-TYPE at the others (Ramshaw & Marcus 1995,
cmp-lg/9505040).

A text answer lists the entities in their order. parse_entities puts each at its first occurrence behind the
one before, so that parse_entities(format_entities(...)) returns the entities exactly, unless the same words
occur untagged before the entity, or a word contains white space. An entity that does not occur in the text
counts as predicted and wrong. The separator is a comma because every vocabulary has seen one; a rarer symbol
may have an untrained embedding.

Public: word_tokens, entity_types, question, format_entities, parse_entities, spans, tags_of
"""
import re
import unicodedata

NO_ENTITIES = "none"
SEPARATOR = r",\s+(?=[^\s,:]+:)"                        # a comma that a TYPE: follows


def word_tokens(tokens, tokenizer, start):
    """Encode words joined by spaces, behind the id `start`.

    Returns (ids, positions): positions[i] is the index in ids of the first token of word i. An empty word is
    encoded as `start`, so that it has a position.
    """
    ids = [start]
    positions = []
    for i, word in enumerate(tokens):
        positions.append(len(ids))
        text = word if i == 0 else " " + word
        ids += tokenizer.encode(text) or [start]
    return ids, positions


def entity_types(tags):
    """The entity types (PER, LOC, ...) that occur in tags, each once, in order."""
    return list(dict.fromkeys(tag.partition("-")[2] for tag in tags if tag != "O"))


def question(tags):
    """The question for a text answer; tags: all tags of the data set."""
    return f"Which names are in this text: {' or '.join(entity_types(tags))}?"


def format_entities(tokens, tags):
    """The entities of a text as an answer: "PER: Fay, LOC: Hollowby", or "none"."""
    entities = sorted(spans(tags), key=lambda span: span[1])
    parts = [f"{entity_type}: {' '.join(tokens[first:last + 1])}" for entity_type, first, last in entities]
    return ", ".join(parts) or NO_ENTITIES


def _occurrences(words, tokens, taken):
    """The positions at which words occur in tokens without touching a span of `taken`."""
    if not words:
        return []
    found = []
    for first in range(len(tokens) - len(words) + 1):
        last = first + len(words) - 1
        overlaps = any(a <= last and first <= b for _, a, b in taken)
        if tokens[first:last + 1] == words and not overlaps:
            found.append(first)
    return found


def parse_entities(answer, tokens):
    """An answer as a set of (type, first word, last word); -1, -2, ... for entities not in the text."""
    answer = unicodedata.normalize("NFC", answer)           # as some tokenizers return it
    tokens = [unicodedata.normalize("NFC", token) for token in tokens]
    if answer.strip() == NO_ENTITIES:
        return set()
    entities = set()
    search_from = 0
    for n, part in enumerate(re.split(SEPARATOR, answer)):
        entity_type, _, name = part.partition(":")
        words = name.split()
        occurrences = _occurrences(words, tokens, entities)
        if not occurrences:
            entities.add((entity_type.strip(), -1 - n, -1 - n))
            continue
        later = [first for first in occurrences if first >= search_from]
        first = later[0] if later else occurrences[0]
        entities.add((entity_type.strip(), first, first + len(words) - 1))
        search_from = first + len(words)
    return entities


def spans(tags):
    """BIO tags of one text -> a set of (type, first word, last word).

    An I- tag that continues no entity of its type starts one, as in conlleval.
    """
    entities = set()
    start = 0
    current_type = None
    for i, tag in enumerate([*tags, "O"]):                      # the added O closes an entity at the end
        prefix, _, entity_type = tag.partition("-")
        if prefix == "I" and entity_type == current_type:
            continue
        if current_type is not None:
            entities.add((current_type, start, i - 1))
        start = i
        current_type = entity_type if prefix in ("B", "I") else None
    return entities


def tags_of(entities, length):
    """The BIO tags of a text of `length` words; entities that are not in it are left out."""
    tags = ["O"] * length
    for entity_type, first, last in entities:
        if first >= 0:
            tags[first:last + 1] = [f"B-{entity_type}"] + [f"I-{entity_type}"] * (last - first)
    return tags
