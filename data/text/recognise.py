"""data/text/recognise.py: which format is a record in? The keys decide.

Each entry of FORMATS names the sets of keys that identify a format, other keys that it reads, the row type
that it becomes, and the function of converters.py that makes the row.

- A record with the keys of two formats is an error, unless the texts of one are those of the other, or a
  rendering of them (Alpaca's "text"): then the later one in FORMATS is read.
- Dolly and question/answer have common words as keys: beside another format, raw text aside, they do not
  count.
- A key that is nearly one that would decide the format ("labels" beside "text", "Text", " label") is an
  error, because without it the record would be another one. All other keys that are not read are returned.

Public: Format, FORMATS, recognise, to_row, unknown_format, other_format
"""
import difflib
import functools
import pathlib
import re
import typing

from data.runtime.files import DataError, printable
from data.text import converters, messages
from data.text.readers import file_type

BESIDE = "system system_prompt " + " ".join(messages.UNSUPPORTED)      # of a conversation
ANSWERS = "references outputs"
VOTES = "votes_for votes_against"
QUESTION = f"{BESIDE} {ANSWERS} instruction input history"


class Format(typing.NamedTuple):
    """What the code needs to know of a format."""
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
           ("question answer", "question response", "query answer", "query response"),
           f"{QUESTION} context", True),
    Format("messages", "chat", converters.conversation, ("messages",), f"{BESIDE} {ANSWERS}"),
    Format("ShareGPT", "chat", converters.conversation, ("conversations",), f"{BESIDE} {ANSWERS}"),
    Format("prompt/chosen/rejected", "pairs", converters.pair,
           ("prompt chosen rejected", "question chosen rejected"), f"{BESIDE} {VOTES}"),
    Format("Alpaca preference", "pairs", converters.pair,
           ("instruction chosen rejected", "input chosen rejected"), f"{BESIDE} {VOTES} input history"),
    Format("ShareGPT preference", "pairs", converters.pair, ("conversations chosen rejected",),
           f"{BESIDE} {VOTES}"),
    Format("chosen/rejected", "pairs", converters.whole_pair, ("chosen rejected",), f"{BESIDE} {VOTES}"),
    Format("OpenAI preference", "pairs", converters.openai_pair,
           ("input preferred_output non_preferred_output",), f"{BESIDE} {VOTES}"),
    Format("prompt/completion/label", "thumbs", converters.thumbs,
           ("prompt completion label", "prompt response label"), BESIDE),
    Format("kto_tag", "thumbs", converters.thumbs,
           ("messages kto_tag", "conversations kto_tag", "instruction output kto_tag", "input output kto_tag",
            "prompt completion kto_tag", "prompt response kto_tag"), f"{BESIDE} instruction input history"),
    Format("prompt/responses/rank", "ranked", converters.ranking, ("prompt responses rank",), BESIDE),
)}
KEYS = sorted({key for format in FORMATS.values() for key in " ".join(format.key_sets).split()})
READ = set().union(*(format.reads for format in FORMATS.values()))


# ---- keys -> format ----------------------------------------------------------------------------------------
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
    for key in sorted(keys - READ - {"reference"}):     # of predictions.jsonl: no misspelt "references"
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
    """Whether the texts under one list of keys are texts under the other, or all inside its only text."""
    ours = _texts(record, set(keys) - set(others))
    theirs = _texts(record, set(others) - set(keys))
    for some, whole in ((ours, theirs), (theirs, ours)):
        rendered = len(whole) == 1 and all(text in whole[0] for text in some)
        if some and (set(some) <= set(whole) or rendered):
            return True
    return False


def recognise(record, location):
    """(format name, the keys that identify it) of a record; (None, []) if it is in no format.

    Raises DataError for the keys of two formats, and for a misspelt key.
    """
    near = _near_miss(frozenset(record))
    if near:
        key, meant = near
        raise DataError(f'{location}: the key "{printable(key)}" is not read; rename it to "{meant}" if that '
                        "is meant, else to another name")
    matches = _matching_formats(frozenset(record))
    if not matches:
        return None, []
    name, keys = matches[-1]
    if len(matches) > 1:
        involved = {key: record[key] for _, needed in matches for key in needed}
        involved = messages.decode_json(involved, location)
        for other, other_keys in matches[:-1]:
            if not _repeats(involved, keys, other_keys):
                raise DataError(f"{location}: the keys of two formats, {other} and {name}; keep those of one")
    return name, keys


def to_row(record, name, keys, location):
    """(row, names of the keys that are not read) of a record in the format `name`.

    keys: as recognise returns them. Raises DataError, and SkipRow for a record that trains nothing.
    """
    format = FORMATS[name]
    known = {key: record[key] for key in (*keys, *format.optional.split()) if key in record}
    unread = record.keys() - known.keys()
    messages.check_supported(known, location)
    known = messages.decode_json(known, location)
    for key, value in known.items():
        unread |= messages.unread_keys(value, key)
    return format.convert(known, location), unread


# ---- errors ----------------------------------------------------------------------------------------------
def unknown_format(record, location, source):
    """The error for a record whose keys fit no format, with a likely remedy."""
    known = " | ".join(dict.fromkeys(format.key_sets[0].replace(" ", "+") for format in FORMATS.values()))
    keys = ", ".join(map(printable, list(record)[:8])) or "(none)"
    remedy = ""
    if len(record) == 1 and ";" in keys:
        remedy = "; the columns of a .csv are separated by commas"
    elif file_type(pathlib.Path(source)) in (".csv", ".tsv"):
        remedy = "; rename the columns in the first line"
    return DataError(f"{location}: no known format has the keys {keys}; known are {known}{remedy}")


def other_format(record, location, name, first):
    """The error for a record in another format than the file's first: first = (name, keys, location)."""
    first_name, first_keys, first_location = first
    missing = [key for key in first_keys if key not in record]
    fault = f'"{missing[0]}" is missing' if missing else f"the keys of {name}"
    return DataError(f"{location}: {fault}, in a file of {first_name} rows (see {first_location}); "
                     "all rows of a file have one format")
