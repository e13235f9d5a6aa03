"""examples.py: rows become examples, examples become the batches of a step.

    example   (ids, mask)    mask[i] is true where token i is to be predicted: answers and their end tokens
              (ids, label)   for a classification head: the label's number, read at the last token
              Ranking        a prompt with answers of which some are better than others
    step      `batch` examples, cut into micro-batches under a budget of padded tokens

Text is rendered for training, scoring and generation in one place, `Text`: what a model was trained on is
what it is asked with. Feed is a pure function of (seed, step): there is no data state to save or to restore.

Public: Text, Feed, Ranking, targets, size, windows
"""
from dataclasses import dataclass
from typing import NamedTuple

from data import batches, chat
from data.files import DataError
from data.runs import note


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
    frame: tuple = ([], [])         # ids before and after a prompt: the virtual tokens of a template

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
        if "label" not in row:
            return row["messages"]
        ask = self.ask or f"Which label fits this text: {' or '.join(self.labels)}?"
        return [{"role": "user", "content": f"{row['text']}\n\n{ask}"},
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
        return [row["label"]] if "label" in row else row.get("references") or [row["messages"][-1]["content"]]

    def asked(self, row, shots=(), limit=None):
        """Ids up to where the answer begins; solved examples stand in front, as earlier turns. What is longer
        than `limit` loses its beginning: the question is at the end."""
        turns = [turn for other in shots for turn in self.turns(other)] + self.turns(row)[:-1]
        before, after = self.frame
        ids = chat.prompt(turns, self.template, self.tokenizer, self.system)
        return before + ids[-(limit - len(before) - len(after)) if limit else 0:] + after

    def ranking(self, row, block):
        """A preference as (Ranking, was it cut?): answers lose their end, then the prompt its beginning."""
        asked = self.asked(row)
        said = [chat.answer(text, self.template, self.tokenizer) for text in self.answers(row)]
        kept = [ids[:max(block // 2, block - len(asked))] for ids in said]
        room = block - max(map(len, kept))
        ranks = sorted(row["rank"]) if "rank" in row else \
            [0, max(1, row.get("votes_for", 1) - row.get("votes_against", 0))]
        return Ranking(asked[-room:], kept, ranks), kept != said or len(asked) > room

    def encode(self, rows, block, too_long="truncate"):
        """Rows -> (examples, {what happened to long ones: how many})."""
        out, long, (before, after) = [], {"cut": 0, "left out": 0}, self.frame
        for row in rows:
            if "prompt" in row:
                example, cut = self.ranking(row, block)
                long["cut"] += cut
                out.append(example)
                continue
            if self.by == "head":
                ids = self.asked(row, limit=block)
                long["cut"] += len(ids) < len(self.asked(row))
                out.append((ids, self.labels.index(row["label"])))
                continue
            ids, mask = chat.render(self.turns(row), self.template, self.tokenizer, self.system)
            fitted = chat.fit(ids, mask, block - len(before) - len(after), too_long)
            if fitted is None:
                long["left out"] += 1
                continue
            long["cut"] += len(fitted[0]) < len(ids)
            ids, mask = fitted
            k = mask.index(True)
            out.append((before + ids[:k] + after + ids[k:],
                        [False] * len(before) + mask[:k] + [False] * len(after) + mask[k:]))
        return out, long

    def split(self, rows, block, too_long="truncate"):
        """{split: rows} -> {split: examples}. Raw text to train on stays one stream, which Feed cuts."""
        out = {}
        for split, some in rows.items():
            if some and "text" in some[0] and "label" not in some[0]:
                out[split] = self.stream(some)
                if split != "train":                # valid is a look at progress: a stretch of it will do
                    ids = out[split] if split == "test" else out[split][:16384]
                    out[split] = windows(ids, range(0, len(ids) - 1, block), block)
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


def windows(ids, starts, block):
    """Stretches of a stream as examples: `block` predictions each, fewer at the end of the stream."""
    return [(ids[s:s + block + 1], [True] * len(ids[s:s + block + 1])) for s in starts]


def targets(example):
    """How many predictions an example is scored on; the comparisons of a prompt count as one."""
    return sum(example[1][1:]) if isinstance(example[1], list) and len(example) == 2 else 1


def size(example):
    """Its tokens."""
    if isinstance(example, Ranking):
        return sum(len(example.prompt) + len(ids) for ids in example.answers)
    return len(example[0])


class Feed:
    """Step number -> its micro-batches, lists of examples.

    examples  a list of examples, or, given `block`, one stream of ids that each epoch cuts at another offset
    """

    def __init__(self, examples, batch, micro, seed, block=None):
        self.examples, self.batch, self.micro, self.seed, self.block = examples, batch, micro, seed, block
        self.lengths = None if block else list(map(size, examples))
        self.epoch, self.steps = 0, self.plan(0)
        self.per_epoch = len(self.steps)

    def plan(self, epoch):
        if not self.block:
            return batches.plan(self.lengths, self.batch, self.seed, epoch)
        starts = batches.blocks(len(self.examples), self.block, self.seed, epoch)
        return [starts[i:i + self.batch] for i in range(0, len(starts), self.batch)]

    def __call__(self, step):
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.steps = epoch, self.plan(epoch)
        rows = self.steps[i % len(self.steps)]
        rows = windows(self.examples, rows, self.block) if self.block else [self.examples[j] for j in rows]
        return [[rows[j] for j in part]
                for part in batches.micro(range(len(rows)), list(map(size, rows)), self.micro)]
