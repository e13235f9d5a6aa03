"""data/results/trunk.py: blocks below the lowest adapter run once per example, not once per epoch.

With adapters from block k up, what enters block k is the same in every epoch, and for DPO's reference and its
policy. It is computed before the first step for what the run reads at least twice, and kept while the run
lasts, if all of it takes at most SHARE of the memory (of the GPU: of what is free):

    sft, classify, tag, reward, and losses without a reference    training examples of more than one epoch
    losses with a reference                                       every example: the reference reads it first

Of preferences, each answer is a row of its own, its prompt in front; KTO has those of other prompts, too. The
rows are always read in the same batches, so a run that continues has the same bits.

C width  T tokens  B batch
Public: Trunk, count_tokens, bytes_per_token, memory_limit
"""
import os

import torch
from torch.nn.utils.rnn import pad_sequence

from data.batches.batching import split_by_token_budget
from data.batches.examples import Ranking, Thumbs
from data.batches.objectives import Example, collate
from data.runtime.distributed import broadcast, gather, local_rows
from data.runtime.progress import log_progress, track

SHARE = 0.25


class Trunk:
    """What enters block `layer`: hidden {key: (example, (T, C))}, for what was read; see keyed."""

    def __init__(self, layer):
        self.layer = layer
        self.model = None                               # whose blocks they are; a teacher has others
        self.hidden = {}
        self.bytes = 0
        self.is_full = False

    def find(self, examples):
        """(B, T, C), padded with zeros, or None unless all of these very examples are known."""
        return self.find_keys(map(id, examples))

    def find_answers(self, prompts, answers):
        """(what enters the block (B, T, C), the block) of answers behind prompts, lists of ids; or None."""
        found = self.find_keys((*prompt, *answer) for prompt, answer in zip(prompts, answers))
        return None if found is None else (found, self.layer)

    def find_keys(self, keys):
        found = [self.hidden.get(key) for key in keys]
        if None in found:
            return None
        return pad_sequence([hidden for _, hidden in found], batch_first=True)

    @torch.no_grad()
    def read(self, ctx, examples):
        """Run the blocks below for these examples, by all processes together, unless there is no room."""
        new = {key: example for key, example in keyed(examples).items() if key not in self.hidden}
        if not new or not self.has_room(ctx, sum(map(inputs, new.values()))):
            return
        self.model = ctx.model
        keys = list(new)
        examples = list(new.values())
        lengths = list(map(inputs, examples))
        mine = local_rows(range(len(examples)), lengths)
        rows = {}
        for part in track(split_by_token_budget(mine, lengths, 2 * ctx.micro_batch_tokens), "shared blocks"):
            x, _, attention = collate([examples[i] for i in part], ctx.text.attention)
            attention = {name: t.to(ctx.device) for name, t in attention.items()}
            with ctx.autocast():
                hidden, _ = ctx.model.hidden_states(x.to(ctx.device), stop_layer=self.layer, **attention)
            for i, h in zip(part, hidden):
                rows[i] = h[:lengths[i]].clone()                # a view would keep the whole batch
        for some in gather(rows):
            for i, h in some.items():
                self.hidden[keys[i]] = examples[i], h.to(ctx.device)

    def has_room(self, ctx, tokens):
        """Whether so many tokens more fit the memory; from the first that do not, none do."""
        needed = self.bytes + tokens * bytes_per_token(ctx)
        limit = broadcast(lambda: memory_limit(ctx.device))     # GPUs differ, and all processes read or none
        if not self.is_full and needed > limit:
            self.is_full = True
            log_progress(f"blocks 0 to {self.layer - 1} could run once per example, but {needed >> 20:,} MiB "
                         f"are more than {SHARE:.0%} of the memory")
        if not self.is_full:
            self.bytes = needed
        return not self.is_full

    def describe(self):
        """A line about what is kept."""
        if self.hidden:
            log_progress(f"blocks 0 to {self.layer - 1} run once per example: {self.bytes / 2 ** 20:,.1f} MiB "
                         "are kept")


def keyed(examples):
    """{key: example}: the id of an example, kept beside it; of an answer the ids of prompt and answer."""
    found = {}
    for example in examples:
        if isinstance(example, (Ranking, Thumbs)):
            for answer in (*example.answers, *(example.mismatched if isinstance(example, Thumbs) else ())):
                row = (*example.prompt, *answer)
                found[row] = Example(row, [-1] * len(row))
        else:
            found[id(example)] = example
    return found


def inputs(example):
    """How many tokens of an example the model reads: of an (ids, mask) pair the last is only a target."""
    return len(example.ids) if isinstance(example, Example) else max(1, len(example[0]) - 1)


def count_tokens(examples):
    """The tokens that a Trunk of these examples keeps something of."""
    return sum(map(inputs, keyed(examples).values()))


def bytes_per_token(ctx):
    return ctx.model.config.n_embd * ctx.model.wte.weight.element_size()


def memory_limit(device):
    """Bytes that the trunk may take: SHARE of the GPU's free memory, or of the machine's."""
    if device.type == "cuda":
        return SHARE * torch.cuda.mem_get_info(device)[0]
    try:
        return SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):               # not POSIX
        return 0
