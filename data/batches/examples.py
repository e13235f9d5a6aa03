"""data/batches/examples.py: rows become examples, examples become the batches of a step.

    example   (ids, mask)    mask[i] is true where token i is to be predicted: answers and their end tokens
              Example        all else (objectives.py); for a head: a label's number, at the last token of a
                             text or the first of a word
              Ranking        a prompt with answers of which some are better than others
    step      `batch` examples, cut into micro-batches under a budget of padded tokens

Text is rendered for training, scoring and generation in one place, `Text`: what a model was trained on is
what it is asked with. Feed is a pure function of (seed, step): there is no data state to save or to restore.

Public: Text, Feed, Ranking, targets, size, shown
"""
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.batches import batching, objectives
from data.text import chat, entities
from data.runtime.files import DataError
from data.batches.objectives import Example
from data.runtime.run_folder import note


class Ranking(NamedTuple):
    prompt: list                    # ids
    answers: list                   # lists of ids, each with its end token
    ranks: list                     # one per answer, smaller is better; of two 0 and the margin of the votes
    reference: tuple = ()           # DPO: log-probabilities of the two answers before training


@dataclass
class Text:
    """How to talk to a model: its tokenizer, the template, and what is asked of a text that has a label."""
    tokenizer: object
    template: str
    system: str = None
    labels: tuple = ()              # label words in their order, for rows with a label
    ask: str = None                 # the question behind such a row's text; None: one that names the labels
    by: str = "words"               # "words": the label is an answer like any other; "head": a class number
    attention: str = "causal"       # who sees whom: causal; prefix: what is asked, both ways; bidirectional
    objective: str = "causal"       # what raw text is made to teach: causal, prefix, mlm, glm
    frame: tuple = ([], [])         # ids before and after a prompt: the virtual tokens of a template

    def __post_init__(self):
        self.marks = objectives.marks(self.tokenizer, self.objective)

    @property
    def blank(self):
        """What a GLM is asked with, behind the question: a mask, and the start of the span that fills it."""
        fill = self.objective == "glm" and self.attention == "prefix"
        return [self.marks.mask, self.marks.start] if fill else []

    @property
    def end(self):
        """The token that ends an answer."""
        return chat.end_token(self.template, self.tokenizer)

    def said(self, ids):
        """An answer as text."""
        return self.tokenizer.decode([t for t in ids if t != self.end]).strip()

    def turns(self, row):
        """A row as a conversation that ends with the answer, of a preference with the best."""
        if "prompt" in row:
            return [*row["prompt"], {"role": "assistant", "content": self.answers(row)[0]}]
        if "tokens" in row:
            return [{"role": "user", "content": f"{' '.join(row['tokens'])}\n\n{entities.ask(self.labels)}"},
                    {"role": "assistant", "content": self.wanted(row)[0]}]
        if "label" not in row:
            return row["messages"]
        ask = f"Which label fits this text: {' or '.join(self.labels)}?" if self.ask is None else self.ask
        return [{"role": "user", "content": f"{row['text']}\n\n{ask}" if ask else row["text"]},
                {"role": "assistant", "content": row["label"]}]

    def answers(self, row):
        """The answers of a preference, best first; none of a bare prompt is empty."""
        if "responses" not in row:
            return [row.get("chosen", ""), row.get("rejected", "")]
        return [text for _, text in sorted(zip(row["rank"], row["responses"]), key=lambda pair: pair[0])]

    def wanted(self, row):
        """The answers that count as right."""
        if "prompt" in row:
            return self.answers(row)[:1]
        if "tokens" in row:
            return [entities.told(row["tokens"], row["tags"])]
        return [row["label"]] if "label" in row else row.get("references") or [row["messages"][-1]["content"]]

    def asked(self, row, shots=(), limit=None):
        """Ids up to where the answer begins; solved examples stand in front, as earlier turns. What is longer
        than `limit` loses its beginning: the question is at the end."""
        turns = [turn for other in shots for turn in self.turns(other)] + self.turns(row)[:-1]
        before, after = self.frame[0], self.frame[1] + self.blank
        ids = chat.prompt(turns, self.template, self.tokenizer, self.system)
        return before + (chat.shorter(ids, limit - len(before) - len(after)) if limit else ids) + after

    def ranking(self, row, block):
        """A preference as (Ranking, was it cut?): answers lose their end, then the prompt its beginning."""
        asked = self.asked(row)
        said = [chat.answer(text, self.template, self.tokenizer) for text in self.answers(row)]
        kept = [ids[:max(block // 2, block - len(asked))] for ids in said]
        room = block - max(map(len, kept))
        ranks = sorted(row["rank"]) if "rank" in row else \
            [0, max(1, row.get("votes_for", 1) - row.get("votes_against", 0))]
        return Ranking(chat.shorter(asked, room), kept, ranks), kept != said or len(asked) > room

    def encode(self, rows, block, too_long="truncate"):
        """Rows -> (examples, {what happened to long ones: how many})."""
        out, long = [], {"cut": 0, "left out": 0}
        before, after = self.frame[0], self.frame[1] + self.blank
        for row in rows:
            if "prompt" in row:
                example, cut = self.ranking(row, block)
                long["cut"] += cut
                out.append(example)
                continue
            if self.by == "head" and "tokens" in row:
                out.append(self.tagged(row, block))
                long["cut"] += targets(out[-1]) < len(row["tokens"])
                continue
            if self.by == "head":
                ids = self.asked(row)
                if chat.fit(ids, [False] * len(ids), block, too_long, row.get("line", "a row")) is None:
                    long["left out"] += 1
                    continue
                if len(ids) > block:
                    ids, long["cut"] = self.asked(row, limit=block), long["cut"] + 1
                label = self.labels.index(row["label"])                 # read at the last token
                out.append(Example(ids, [-1] * (len(ids) - 1) + [label], *self.view(ids), head=True))
                continue
            ids, mask = chat.render(self.turns(row), self.template, self.tokenizer, self.system)
            fitted = chat.fit(ids, mask, block - len(before) - len(after), too_long, row.get("line", "a row"))
            if fitted is None:
                long["left out"] += 1
                continue
            long["cut"] += len(fitted[0]) < len(ids)
            ids, mask = fitted
            k = mask.index(True)
            mask = [False] * len(before) + mask[:k] + [False] * len(after) + mask[k:]
            ids, start = before + ids[:k] + after + ids[k:], mask.index(True) - 1
            out.append(Example(ids[:-1], [t if on else -1 for t, on in zip(ids[1:], mask[1:])], start,
                               objectives.filled(len(ids) - 1, start)) if self.blank else (ids, mask))
        return out, long

    def tagged(self, row, block):
        """A row of words and tags for the head. Too many words: the last ones are not read, and O."""
        (before, after), start = self.frame, chat.prompt([], "plain", self.tokenizer, "")[0]
        ids, first = entities.pieces(row["tokens"], self.tokenizer, start)
        ids = before + ids[:block - len(before) - len(after)] + after
        y = [-1] * len(ids)
        for i, tag in zip(first, row["tags"]):
            if i + len(before) < len(ids) - len(after):
                y[i + len(before)] = self.labels.index(tag)
        return Example(ids, y, len(ids) * (self.attention != "causal"), head=True)

    def view(self, ids):
        """(sees, places) of what is asked: it sees itself both ways or not at all; a blank's start token is
        seen by no other."""
        sees = 0 if self.attention == "causal" else len(ids) - bool(self.blank)
        return sees, objectives.filled(len(ids), sees) if self.blank else None

    def split(self, rows, block, too_long="truncate"):
        """{split: rows} -> {split: examples}. Raw text to train on stays one stream, which Feed cuts."""
        out = {}
        for split, some in rows.items():
            if some and "text" in some[0] and "label" not in some[0]:
                out[split] = self.stream(some)
                if split != "train":                # valid is a look at progress: a stretch of it will do
                    ids = out[split] if split == "test" else out[split][:16384]
                    step = objectives.stride(self.objective, block)
                    out[split] = self.windows(ids, range(0, len(ids) - 1, step), step, 0)
                continue
            out[split], long = self.encode(some, block, too_long)
            if any(long.values()):
                said = " and ".join(f"{n} {what}" for what, n in long.items() if n)
                note(f"{split}: {said} because longer than {block} tokens")
            if some and not out[split]:
                raise DataError(f"0 usable examples in {split}: {len(some)} are longer than {block} tokens; "
                                "use a larger --block, or --too_long truncate")
        return out

    def stream(self, rows):
        """Raw text as one stream of ids, an end-of-text token behind each row."""
        end = [self.tokenizer.eos] if self.tokenizer.eos is not None else []
        return [i for row in rows for i in self.tokenizer.encode(row["text"]) + end]

    def windows(self, ids, starts, step, *seed):
        """Stretches of a stream as examples: about `step` predictions each, fewer at the end of the stream.
        What is drawn to corrupt them depends on `seed` and a window's number alone."""
        return [objectives.corrupt(self.objective, ids[s:s + step + 1], np.random.default_rng([*seed, i]),
                                   self.marks) for i, s in enumerate(starts)]


def targets(example):
    """How many predictions an example is scored on; the comparisons of a prompt count as one."""
    if isinstance(example, Example):
        return sum(t >= 0 for t in example.y)
    return 1 if isinstance(example, Ranking) else sum(example[1][1:])


def size(example):
    """Its tokens."""
    if isinstance(example, Ranking):
        return sum(len(example.prompt) + len(ids) for ids in example.answers)
    return len(example[0])


def shown(example):
    """An example as (ids, mask), for people; of a preference the prompt and its best answer."""
    if isinstance(example, Ranking):
        said = example.answers[0]
        return example.prompt + said, [False] * len(example.prompt) + [True] * len(said)
    if not isinstance(example, Example):
        return example
    on = [t >= 0 for t in example.y]
    if example.head:                                # marked where the label is read, else what is to be said
        return example.ids, on
    return [*example.ids, example.y[-1]], [False, *on]


class Feed:
    """Step number -> its micro-batches, lists of examples.

    examples  a list of examples, or, given `block`, one stream of ids that each epoch cuts at another offset,
              and of which `text` makes examples
    """

    def __init__(self, examples, batch, micro, seed, block=None, text=None):
        self.examples, self.batch, self.micro, self.seed, self.text = examples, batch, micro, seed, text
        self.block = block and objectives.stride(text.objective, block)
        self.lengths = None if block else list(map(size, examples))
        self.epoch, self.steps = 0, self.plan(0)
        self.per_epoch = len(self.steps)

    def plan(self, epoch):
        if not self.block:
            return batching.plan(self.lengths, self.batch, self.seed, epoch)
        starts = batching.blocks(len(self.examples), self.block, self.seed, epoch)
        return [starts[i:i + self.batch] for i in range(0, len(starts), self.batch)]

    def rows(self, step):
        """The examples of a step."""
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.steps = epoch, self.plan(epoch)
        rows = self.steps[i % len(self.steps)]
        if self.block:
            return self.text.windows(self.examples, rows, self.block, 1, self.seed, step)
        return [self.examples[j] for j in rows]

    def cut(self, rows):
        """Examples -> micro-batches."""
        return [[rows[j] for j in part]
                for part in batching.micro(range(len(rows)), list(map(size, rows)), self.micro)]

    def __call__(self, step):
        return self.cut(self.rows(step))
