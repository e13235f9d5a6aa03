"""examples.py: rows become examples, examples become the batches of a step.

    example   (ids, mask)    mask[i] is true where token i is to be predicted: answers and their end tokens
              (ids, label)   for a classification head: the label's number, read at the last token
    step      `batch` examples, cut into micro-batches under a budget of padded tokens

Text is rendered for training, scoring and generation in one place, `Text`: what a model was trained on is
what it is asked with. Feed is a pure function of (seed, step): there is no data state to save or to restore.

Public: Text, Feed, targets, windows
"""
from dataclasses import dataclass

from data import batches, chat
from data.files import DataError
from data.runs import note


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

    def turns(self, row):
        """A row as a conversation that ends with the answer."""
        if "label" not in row:
            return row["messages"]
        ask = self.ask or f"Which label fits this text: {' or '.join(self.labels)}?"
        return [{"role": "user", "content": f"{row['text']}\n\n{ask}"},
                {"role": "assistant", "content": row["label"]}]

    def wanted(self, row):
        """The answers that count as right."""
        return [row["label"]] if "label" in row else row.get("references") or [row["messages"][-1]["content"]]

    def asked(self, row, shots=()):
        """Ids up to where the answer begins; solved examples stand in front, as earlier turns."""
        turns = [turn for other in shots for turn in self.turns(other)] + self.turns(row)[:-1]
        before, after = self.frame
        return before + chat.prompt(turns, self.template, self.tokenizer, self.system) + after

    def encode(self, rows, block, too_long="truncate"):
        """Rows -> (examples, {what happened to long ones: how many})."""
        out, long, (before, after) = [], {"cut": 0, "left out": 0}, self.frame
        for row in rows:
            if self.by == "head":
                ids = self.asked(row)
                long["cut"] += len(ids) > block
                out.append((ids[-block:], self.labels.index(row["label"])))     # its end is where it is read
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
    """How many predictions an example is scored on."""
    return sum(example[1][1:]) if isinstance(example[1], list) else 1


class Feed:
    """Step number -> its micro-batches, lists of examples.

    examples  a list of examples, or, given `block`, one stream of ids that each epoch cuts at another offset
    """

    def __init__(self, examples, batch, micro, seed, block=None):
        self.examples, self.batch, self.micro, self.seed, self.block = examples, batch, micro, seed, block
        self.lengths = None if block else [len(ids) for ids, _ in examples]
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
                for part in batches.micro(range(len(rows)), [len(ids) for ids, _ in rows], self.micro)]
