"""data/batches/few_shot.py: solved examples in front of a question, as many as were asked for and as the context holds.

    fitted    the oldest examples leave first, whole, until question and answer fit; a question alone too long
              loses its beginning
    ladder    the same measurement at each number of --shots, up to the first that no question has room for

A column of the table is "held", the mean number of examples that stood in front of a question. As long as it
equals the number asked for, a line compares with the one before; from where it does not, the context is what
is measured. Brown et al. 2020 (2005.14165), figure 1.2, draw such a ladder.

Public: counts, fitted, ladder, table
"""
from data.text import chat
from data.runtime.files import UserError
from data.runtime.run_folder import note, say


def counts(text, kind="chat", by="words"):
    """"0,1,2,4" -> [0, 1, 2, 4]; any but 0 needs rows that ask, and a model that answers in words."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or sorted(set(found)) != found:
        raise UserError(f"--shots {text} cannot be read; it is a number, or a rising list such as 0,1,2,4,8")
    if found != [0] and (kind not in ("chat", "label", "tags") or by != "words"):
        raise UserError(f"--shots {text} puts answers in words in front of a question, and this run has "
                        + (f"{kind} rows, which ask nothing" if by == "words" else "a head, not words"))
    return found


def fitted(kit, row, shots):
    """(ids of the question behind examples, how many of them there was room for)."""
    text, most = kit.text, kit.room() - 1
    ids = text.asked(row, shots)
    if len(ids) <= kit.room() // 2:                     # which an answer leaves free, whatever it is
        return ids, len(shots)
    if "label" in row and kit.head is None:             # a word has to fit behind the question
        words = [chat.answer(label, text.template, text.tokenizer) for label in text.labels]
        most = kit.room() - max(map(len, words))
    room = most if "label" in row else kit.asking()
    if shots and len(ids) > room:
        held, many = 0, len(shots) - 1
        while held < many:                              # by halves: a list may be long
            n = (held + many + 1) // 2
            fits = len(text.asked(row, shots[len(shots) - n:])) <= room
            held, many = (n, many) if fits else (held, n - 1)
        shots = shots[len(shots) - held:]
        ids = text.asked(row, shots)
    if len(ids) > most:
        ids = text.asked(row, shots, most)
    return ids, len(shots)


def ladder(asked, measure, first):
    """[(number, metrics)] for the numbers asked, of which measure(n) gives (metrics, answers), and the last
    answers; first: the metrics of the first number, known already."""
    out, said = [(asked[0], first)], None
    for n in asked[1:]:
        found, said = measure(n)
        out.append((n, found))
        note(f"--shots {n}  " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
        if found["most"] < n:
            note(f"no question has more than {found['most']} examples in front of it: the context (or the "
                 "data) ends there, and more would change nothing")
            break
    return out, said


def table(rungs):
    """The ladder on stdout, and its main number by --shots, for result.json."""
    names = [name for name in rungs[-1][1] if name not in ("targets", "most")]
    say(f"{'shots':>6}" + "".join(f"{name:>13}" for name in names))
    for n, found in rungs:
        say(f"{n:6}" + "".join(f"{found[name]:13.4f}" if name in found else " " * 13 for name in names))
    say()
    return {f"{names[0]}_{n}_shots": found[names[0]] for n, found in rungs}
