"""data/batches/objectives.py: what a stretch of raw text is made to teach, and who sees whom while it does.

              the model is given                      it says                       sees both ways
    causal    x_1 .. x_n                              each next token               nothing
    prefix    x_1 .. x_n                              the next tokens from x_s on   x_1 .. x_s-1, any s
    mlm       15 % of x hidden                        those 15 %, where they are    all of it
    glm       A: x, a mask for each of some spans     nothing                       A
              B: start, span; start, span; ...        the span, then the end        nothing; each sees A

prefix: Raffel et al. 2020 (1910.10683), 3.2.1; Dong et al. 2019 (1905.03197). mlm: Devlin et al. 2019
(1810.04805), 3.1: of the chosen 80 % are masked, 10 % are another token, 10 % stay. glm: Du et al. 2022
(2103.10360), 2.1: spans of Poisson(3) tokens, 15 % of the text in all, generated in random order.

A token has two places: in the corrupted text (a span's tokens: that of its mask) and in its span (1 for its
start token, then 2, 3 ...; 0 in A). Learned positions: the paper has a table for each; here the second counts
down from the end of the one table, which no A reaches, so that the model stays an ordinary GPT-2. Rotary
positions: both channels turn the same angle, so the token stands at their sum, as if its span were written
out from its mask on, over the text behind it: distances inside a span and to its mask are exact.

A GLM's answer fills a blank, too (2103.10360, 2.3): it is asked with the question, a mask and a start token.
BERT has no next word to say; asked in words (--task sft) it learns to, with the question as a prefix.

Deviations. Documents' ends are not hidden by mlm. A Poisson draw of 0 counts as 1; the last span is cut, to
make 15 %. A span ends with end of text. Fewer tokens of text fit a block under glm, for its spans come twice.

A corruption is a pure function of (ids, rng). An example is (ids, mask), as in examples.py, or an Example.

Public: OBJECTIVES, REACH, Example, Marks, marks, of, stride, corrupt, filled, collate
"""
import typing

import numpy as np
import torch

from data.batches import batching
from data.runtime.files import UserError

REACH = {"causal": "causal", "prefix": "prefix", "mlm": "bidirectional", "glm": "prefix"}
OBJECTIVES, ATTENTION = tuple(REACH), ("causal", "bidirectional")
RATE, SPAN = 0.15, 3


class Example(typing.NamedTuple):
    """Where (ids, mask) will not do: targets that are not the next token, tokens that see each other."""
    ids: list                       # what goes in
    y: list                         # what each position is to say; -1: nothing
    sees: int = 0                   # so many tokens, from the first, see each other both ways
    places: tuple = None            # a token's place in the text, and in its span; None: 0, 1, 2, ...
    head: bool = False              # y holds labels, for a linear head, and not ids


class Marks(typing.NamedTuple):
    """The tokens that corruption needs: ids, and those that are words rather than marks."""
    mask: int
    start: int
    end: int
    words: np.ndarray


def marks(tokenizer, objective):
    """The marks of a tokenizer, as far as the objective needs them."""
    found = {name: next((tokenizer.special[t] for t in (f"<|{name}|>", f"<{name}>", f"[{name.upper()}]")
                         if t in tokenizer.special), None) for name in ("mask", "start")}
    needed = {"mlm": ("mask",), "glm": ("mask", "start")}.get(objective, ())
    if missing := [name for name in needed if found[name] is None]:
        raise UserError(f"--objective {objective} needs a <|{missing[0]}|> token, and this model's tokenizer "
                        "has none; use --objective prefix, or a model of --init new")
    if objective == "glm" and tokenizer.eos is None:
        raise UserError("--objective glm ends a span with end of text, and this model's tokenizer names none")
    words = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.special.values()))
    return Marks(**found, end=tokenizer.eos, words=np.array(words))


def of(task, attention, objective, said):
    """(attention, objective) of a command: as asked, or as the run that wrote `said` (run.json) left them."""
    objective = objective or said.get("objective", "causal")
    left = REACH[objective] if task == "pretrain" else said.get("attention", "causal")
    if task == "sft" and left == "bidirectional":       # it has never said a next word: here it learns to
        left = "prefix"
    if task in ("reward", "dpo", "ppo", "sample") and (left, objective) != ("causal", "causal"):
        raise UserError(f"--task {task} reads causally, and --init has learnt --objective {objective} with "
                        f"{left} attention; start from a causal model")
    return attention or left, objective


def stride(objective, block):
    """How many tokens further the next window of text begins: one window is one example of `block` tokens."""
    step = {"mlm": block - 1, "glm": (block - 1) * 10 // 13 - 1}.get(objective, block)
    if step < 1:
        raise UserError(f"--block {block} is no room for --objective {objective}; it takes 4 tokens at least")
    return step


# ---- corruption --------------------------------------------------------------------------------------------
def prefix(ids, rng):
    source = int(rng.integers(1, len(ids)))
    return ids, [False] * source + [True] * (len(ids) - source)


def mlm(ids, rng, m):
    ids, y, words = list(ids), [-1] * len(ids), set(m.words.tolist())
    may = [i for i, token in enumerate(ids) if token in words]
    for i in rng.permutation(may)[:max(1, round(RATE * len(may)))]:
        y[i], luck = ids[i], rng.random()
        ids[i] = m.mask if luck < 0.8 else int(rng.choice(m.words)) if luck < 0.9 else ids[i]
    return Example(ids, y, len(ids))


def glm(ids, rng, m):
    lengths, hide = [], max(1, round(RATE * len(ids)))
    while sum(lengths) < hide:
        lengths.append(min(max(1, int(rng.poisson(SPAN))), hide - sum(lengths)))
    size = len(ids) - hide + len(lengths)                               # of A
    at = set(rng.choice(size, len(lengths), replace=False).tolist())    # its masks, anywhere in it
    a, spans, i = [], [], 0
    for j in range(size):
        n = lengths[len(spans)] if j in at else 1
        if j in at:
            spans.append((j, ids[i:i + n]))
        a, i = a + ([m.mask] if j in at else ids[i:i + 1]), i + n
    b, y, where, within = [], [], [], []
    for k in rng.permutation(len(spans)):
        j, span = spans[k]
        b, y = b + [m.start, *span], y + [*span, m.end]
        where, within = where + [j] * (len(span) + 1), within + list(range(1, len(span) + 2))
    return Example(a + b, [-1] * size + y, size, ([*range(size), *where], [0] * size + within))


def filled(n, start):
    """Places of n tokens in which one span, from its start token at `start` on, fills the mask before it."""
    return [min(i, start - 1) for i in range(n)], [max(0, i - start + 1) for i in range(n)]


def corrupt(objective, ids, rng, m):
    """A window of text as an example of the objective."""
    if objective in ("mlm", "glm"):
        return {"mlm": mlm, "glm": glm}[objective](ids, rng, m)
    return prefix(ids, rng) if objective == "prefix" else (ids, [True] * len(ids))


# ---- batches -----------------------------------------------------------------------------------------------
def collate(examples, attention="causal"):
    """x, y (B, T) right-padded, and what else the trunk has to be told: {} where attention is causal.

    Under "prefix" all that precedes an example's first target is its source, and sees itself both ways.
    """
    if not isinstance(examples[0], Example):
        sees = [mask.index(True) if True in mask else 0 for _, mask in examples] * (attention == "prefix")
        return *batching.collate(examples), {"sees": torch.tensor(sees)} if any(sees) else {}
    T, view = max(len(e.ids) for e in examples), {}

    def grid(rows, fill=0):                                             # (B, T)
        return torch.tensor([[*row, *[fill] * (T - len(row))] for row in rows])

    if any(e.sees for e in examples):
        view["sees"] = torch.tensor([e.sees for e in examples])
    if examples[0].places:
        view["places"] = torch.stack([grid(e.places[channel] for e in examples) for channel in (0, 1)])
    return grid(e.ids for e in examples), grid((e.y for e in examples), -1), view
