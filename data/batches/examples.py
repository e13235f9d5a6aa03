"""data/batches/examples.py: rows -> examples -> the micro-batches of a step.

    (ids, mask)   mask[i] is true where token i is a target: answers and their end tokens
    Example       where that is not enough (objectives.py): other targets, bidirectional attention, a head
    Ranking       a prompt with better and worse answers (row_types.py)
    Thumbs        a prompt with good or bad answers

    rows --Text.encode--> examples --Feed(step)--> micro-batches --objectives.collate--> tensors

Text renders a row in one place for training, scoring and generation, so that a model is prompted with
exactly the tokens that it was trained on. Feed is a pure function of (seed, step): no data state is saved
or restored.

Public: Text, Feed, Ranking, Thumbs, training_facts, targets, size, display
"""
from dataclasses import dataclass

import numpy as np

from data.batches import batching, objectives
from data.batches.objectives import Example
from data.batches.row_types import ROW_TYPES, Ranking, Thumbs, row_type_of
from data.text import chat
from data.runtime.files import DataError
from data.runtime.flags import flag
from data.runtime.progress import Progress
from data.runtime.run_folder import log_progress


@dataclass(frozen=True)
class TextFlags:
    """text"""
    template: str = flag("auto", "chat template", choices=("auto", *(t.name for t in chat.TEMPLATES)))
    system: str = flag(None, "system message; default: the template's own", type=str)


@dataclass(frozen=True)
class BlockFlags:
    """text"""
    block_size: int = flag(None, "longest example in tokens; default: the context, at most 1024", type=int,
                           low=2, high=2 ** 24)


@dataclass(frozen=True)
class TooLongFlags:
    """text"""
    too_long: str = flag("truncate", "what to do with longer examples", choices=("truncate", "drop", "error"))


@dataclass(frozen=True)
class ClassifyFlags:
    """classify"""
    classifier: str = flag("lm", "answer with a label word, or use a linear head", choices=("lm", "head"))
    question: str = flag(None, "the question behind each text; default: one that names the labels", type=str)


MAX_VALID_TOKENS = 1 << 14                  # of raw text: validation during training uses no more than these


@dataclass
class Text:
    """How rows become token ids: tokenizer, chat template, labels and the question that asks for one."""
    tokenizer: object
    template: str
    system: str = None                      # where a conversation has no system message; None: the default
    labels: tuple = ()                      # label words, or tags, in the order of their class numbers
    question: str = None                    # what follows a text with a label; None: a list of the labels
    classifier: str = "lm"                  # "lm": a label is generated; "head": it is a class number
    attention: str = "causal"               # "causal", "prefix" (prompt bidirectional), "bidirectional"
    objective: str = "causal"               # of raw text: causal, prefix, mlm, glm
    parse_special: bool = False             # raw text names special tokens (<|im_end|>), which are read as such
    soft_prompt_ids: tuple = ([], [])       # virtual tokens before and after a prompt (--prompt_template)

    def __post_init__(self):
        self.special_tokens = objectives.special_tokens(self.tokenizer, self.objective)

    @property
    def infill_suffix(self):
        """The ids behind a GLM's prompt: a mask, and the start token of the span that fills it; else []."""
        if self.objective == "glm" and self.attention == "prefix":
            return [self.special_tokens.mask, self.special_tokens.start]
        return []

    @property
    def around_prompt(self):
        """(before, after): the ids that stand before and after the prompt's own."""
        before, after = self.soft_prompt_ids
        return before, after + self.infill_suffix

    @property
    def end_token(self):
        """The id of the token that ends an answer."""
        return chat.end_token(self.template, self.tokenizer)

    @property
    def start_length(self):
        """How many ids at the start of a prompt are kept when it is cut."""
        return chat.start_length(self.template, self.tokenizer)

    def decode_answer(self, ids):
        """The text of generated ids, without end token and surrounding white space."""
        end = self.end_token
        return self.tokenizer.decode([token for token in ids if token != end]).strip()

    # ---- one row -------------------------------------------------------------------------------------------
    def turns(self, row):
        """A row as a conversation that ends with the answer (of a preference: the best answer)."""
        return row_type_of(row).turns(self, row)

    def references(self, row):
        """The answers to a row that count as correct."""
        return row_type_of(row).references(self, row)

    def prompt_ids(self, row, shots=(), limit=None):
        """ids of a row up to where its answer begins.

        shots   rows whose conversations precede it, as few-shot examples
        limit   a longer prompt is cut on the left, behind its start tokens
        """
        messages = []
        for other in shots:
            messages += self.turns(other)
        messages += self.turns(row)[:-1]
        ids = chat.prompt(messages, self.template, self.tokenizer, self.system) or [self.end_token]
        before, after = self.around_prompt
        if limit:
            ids = chat.truncate_left(ids, limit - len(before) - len(after), self.start_length)
        return before + ids + after

    def attention_args(self, ids):
        """(bidirectional_len, glm_positions) of a prompt.

        The tokens before a GLM's start token do not attend to it, so it is not part of the bidirectional
        prefix.
        """
        suffix = self.infill_suffix
        if self.attention == "causal":
            bidirectional_len = 0
        else:
            bidirectional_len = len(ids) - 1 if suffix else len(ids)
        glm_positions = objectives.glm_single_span(len(ids), bidirectional_len) if suffix else None
        return bidirectional_len, glm_positions

    def ranking(self, row, block):
        """A preference row as (Ranking of at most `block` tokens per answer, whether anything was cut)."""
        return row_type_of(row).encode(self, row, block, "truncate")

    def label_answers(self):
        """The ids of each label as an answer, its end token last."""
        return [chat.answer(label, self.template, self.tokenizer) for label in self.labels]

    # ---- many rows -----------------------------------------------------------------------------------------
    def encode(self, rows, block, too_long="truncate"):
        """Rows -> (examples of at most `block` tokens, {"truncated": how many, "dropped": how many}).

        too_long: "truncate", "drop", or "error" (raises DataError with the row's location).
        """
        examples = []
        counts = {"truncated": 0, "dropped": 0}
        with Progress("encoding", len(rows)) as progress:
            for row in rows:
                example, truncated = row_type_of(row).encode(self, row, block, too_long)
                progress.update()
                if example is None:
                    counts["dropped"] += 1
                    continue
                counts["truncated"] += truncated
                examples.append(example)
        return examples, counts

    def encode_splits(self, rows, block, too_long="truncate", test_windows=0):
        """{split: rows} -> {split: examples}. For training, raw text stays one stream of ids (see Feed).

        test_windows: how many windows of raw text test has; 0: all.
        Raises DataError when every row of a split is dropped.
        """
        encoded = {}
        for split, split_rows in rows.items():
            if split_rows and row_type_of(split_rows[0]) is ROW_TYPES["text"]:
                encoded[split] = self._encode_text(split_rows, split, block, test_windows)
                continue
            encoded[split], counts = self.encode(split_rows, block, too_long)
            if any(counts.values()):
                listed = " and ".join(f"{n} {what}" for what, n in counts.items() if n)
                log_progress(f"{split}: {listed}, because they are longer than {block} tokens")
            if split_rows and not encoded[split]:
                raise DataError(f"0 usable examples in {split}: all {len(split_rows)} are longer than "
                                f"{block} tokens; use a larger --block_size, or --too_long truncate")
        return encoded

    def _encode_text(self, rows, split, block, test_windows):
        ids = self.stream(rows)
        if split == "train":
            return ids
        if split == "valid":
            ids = ids[:MAX_VALID_TOKENS]
        step = objectives.stride(self.objective, block)
        starts = range(0, len(ids) - 1, step)
        if split == "test" and test_windows:
            starts = starts[:test_windows]
        return self.windows(ids, starts, step, 0)

    def stream(self, rows):
        """Raw text as one list of ids, an end-of-text token behind each row."""
        end = [] if self.tokenizer.eos is None else [self.tokenizer.eos]
        ids = []
        with Progress("encoding", len(rows)) as progress:
            for row in rows:
                ids += self.tokenizer.encode(row["text"], special=self.parse_special)
                ids += end
                progress.update()
        return ids

    def windows(self, ids, starts, step, *seed):
        """Windows of a stream as examples of `step` predictions each, fewer at the end of the stream.

        The corruption of a window depends on `seed` (integers) and its number in starts only.
        """
        examples = []
        for number, start in enumerate(starts):
            rng = np.random.default_rng([*seed, number])
            window = ids[start:start + step + 1]
            examples.append(objectives.corrupt(self.objective, window, rng, self.special_tokens))
        return examples


def training_facts(text, rows):
    """What a chat with a model has to know of the rows it was trained on, for its run.json.

    row_type    of the rows
    turns       questions in the longest conversation; 1: single questions
    systems     number of different system messages in the rows
    system      the one that all rows have, if no other is the default
    """
    row_type = row_type_of(rows[0])
    if row_type.turns is None:                              # raw text
        return {"row_type": row_type.name}
    questions = 0
    systems = set()                                         # None stands for a row without one
    for row in rows:
        turns = text.turns(row)
        roles = [turn["role"] for turn in turns]
        questions = max(questions, roles.count("user"))
        systems.update(turn["content"] for turn in turns if turn["role"] == "system")
        if "system" not in roles:
            systems.add(None)
    facts = {"row_type": row_type.name, "turns": questions, "systems": len(systems - {None})}
    if text.system is None and len(systems) == 1 and None not in systems:
        facts["system"] = systems.pop()
    return facts


# ---- examples ----------------------------------------------------------------------------------------------
def targets(example):
    """How many predictions an example is scored on; the answers of a preference count as one."""
    if isinstance(example, (Ranking, Thumbs)):
        return 1
    if isinstance(example, Example):
        return sum(target >= 0 for target in example.y)
    _, mask = example
    return sum(mask[1:])                                    # nothing predicts the first token


def size(example):
    """The number of tokens of an example; of a preference, of all its sequences."""
    if isinstance(example, (Ranking, Thumbs)):
        return sum(len(example.prompt) + len(ids) for ids in example.answers)
    return len(example[0])


def display(example):
    """An example as [(title, ids, mask)] for printing: one entry, of a preference one for each answer.

    With a classifier head the mask marks the tokens at which a class is read.
    """
    if isinstance(example, Ranking):
        return [(f" answer {n} of {len(example.answers)}, best first", example.prompt + ids,
                 [False] * len(example.prompt) + [True] * len(ids))
                for n, ids in enumerate(example.answers, 1)]
    if isinstance(example, Thumbs):
        return [(" a good answer" if good else " a bad answer", example.prompt + ids,
                 [False] * len(example.prompt) + [True] * len(ids))
                for ids, good in zip(example.answers, example.good)]
    if not isinstance(example, Example):
        return [("", *example)]
    has_target = [target >= 0 for target in example.y]
    if example.head:
        return [("", example.ids, has_target)]
    return [("", [*example.ids, example.y[-1]], [False, *has_target])]


# ---- steps -------------------------------------------------------------------------------------------------
class Feed:
    """feed(step) -> the micro-batches of a step, lists of examples.

    examples             a list of examples; or, with block, one stream of ids (each epoch at another offset)
    batch                examples (windows) per step
    micro_batch_tokens   the budget of a micro-batch, in padded tokens
    block, text          for a stream: the block size, and the Text that corrupts its windows
    """

    def __init__(self, examples, batch, micro_batch_tokens, seed, block=None, text=None):
        self.examples = examples
        self.batch = batch
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.text = text
        self.stride = objectives.stride(text.objective, block) if block else None
        self.lengths = None if block else [size(example) for example in examples]
        self.epoch = 0
        self.steps = self._plan(0)
        self.steps_per_epoch = len(self.steps)
        count = sum(map(len, self.steps))
        if batch > count:
            log_progress(f"a step of {batch} is more than the {count} examples there are: each takes all of "
                         "them")

    def _plan(self, epoch):
        """The steps of an epoch: lists of indices of examples, or of starts of windows."""
        if self.stride is None:
            return batching.plan(self.lengths, self.batch, self.seed, epoch)
        starts = batching.blocks(len(self.examples), self.stride, self.seed, epoch)
        ends = batching.step_sizes(len(starts), self.batch).cumsum().tolist()
        return [starts[begin:end] for begin, end in zip([0, *ends], ends)]

    def indices(self, step):
        """What a step consists of: indices of examples, or starts of windows."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.steps = self._plan(epoch)
        return self.steps[number]

    def step_examples(self, step):
        """The examples of a step."""
        if self.stride is None:
            return [self.examples[i] for i in self.indices(step)]
        return self.text.windows(self.examples, self.indices(step), self.stride, 1, self.seed, step)

    def used(self, steps):
        """The indices of the examples that the first `steps` steps use, sorted; not for a stream."""
        return sorted({i for step in range(min(steps, self.steps_per_epoch)) for i in self.indices(step)})

    def tokens(self, steps):
        """The tokens of the first `steps` steps; of a stream, as if all its windows were as long as the first
        step's on average."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        last = [i for step in range(steps - rest, steps) for i in self.indices(step)]
        if self.stride is None:
            return epochs * sum(self.lengths) + sum(self.lengths[i] for i in last)
        first = self.step_examples(0)
        windows = epochs * sum(map(len, self.steps)) + len(last)
        return round(windows * sum(map(size, first)) / len(first))

    def micro_batches(self, examples):
        """Examples -> micro-batches, lists of examples."""
        lengths = [size(example) for example in examples]
        parts = batching.split_by_token_budget(range(len(examples)), lengths, self.micro_batch_tokens)
        return [[examples[i] for i in part] for part in parts]

    def __call__(self, step):
        return self.micro_batches(self.step_examples(step))
