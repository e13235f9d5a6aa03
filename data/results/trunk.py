"""data/results/trunk.py: blocks below the lowest adapter run once per example, not once per epoch.

With adapters from block k up, what enters block k is the same in every epoch. It is computed before the first
step, for every example that the run reads, and kept while the run lasts, if the run reads an example twice and
all of it takes at most SHARE of the memory (of the GPU: of what is free).

The examples are always read in the same batches, so a run that continues has the same bits.

C width  T tokens  B batch
Public: Trunk, open_trunk, memory_limit
"""
import os

import torch

from data.batches.batching import split_by_token_budget
from data.batches.examples import Ranking, size
from data.batches.objectives import Example, collate
from data.runtime.distributed import gather, local_rows
from data.runtime.progress import log_progress, track

SHARE = 0.25


class Trunk:
    """What enters block `layer`, for examples that were read: hidden {id(example): (example, (T, C))}."""

    def __init__(self, layer):
        self.layer = layer
        self.hidden = {}

    def find(self, examples):
        """(B, T, C), padded with zeros, or None unless all of these very examples are known."""
        found = [self.hidden.get(id(example)) for example in examples]
        if None in found:
            return None
        return torch.nn.utils.rnn.pad_sequence([hidden for _, hidden in found], batch_first=True)

    @torch.no_grad()
    def read(self, ctx, examples):
        """Run the blocks below for these examples, by all processes together."""
        lengths = [size(example) for example in examples]
        mine = local_rows(range(len(examples)), lengths)
        rows = {}
        for part in track(split_by_token_budget(mine, lengths, 2 * ctx.micro_batch_tokens), "shared blocks"):
            x, _, attention = collate([examples[i] for i in part], ctx.text.attention)
            attention = {name: t.to(ctx.device) for name, t in attention.items()}
            with ctx.autocast():
                hidden, _ = ctx.model.hidden_states(x.to(ctx.device), stop_layer=self.layer, **attention)
            for i, h in zip(part, hidden):
                rows[i] = h[:inputs(examples[i])].clone()       # a view would keep the whole batch
        for some in gather(rows):
            for i, h in some.items():
                self.hidden[id(examples[i])] = examples[i], h.to(ctx.device)


def inputs(example):
    """How many tokens of an example the model reads: of an (ids, mask) pair the last is only a target."""
    return len(example.ids) if isinstance(example, Example) else max(1, len(example[0]) - 1)


def memory_limit(device):
    """Bytes that the trunk may take: SHARE of the GPU's free memory, or of the machine's."""
    if device.type == "cuda":
        return SHARE * torch.cuda.mem_get_info(device)[0]
    try:
        return SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):               # not POSIX
        return 0


def open_trunk(ctx, layer, feed, total):
    """The Trunk of a run of `total` steps whose lowest adapter is in block `layer`, or None where it does not
    pay: nothing below, a stream of windows, every example read once, or no room; and for rankings."""
    if not layer or feed.stride is not None or total <= feed.steps_per_epoch:
        return None
    examples = feed.examples
    if isinstance(examples[0], Ranking):
        return None
    tokens = sum(map(inputs, examples))
    width = ctx.model.config.n_embd
    needed = tokens * width * torch.finfo(ctx.model.wte.weight.dtype).bits // 8
    if needed > memory_limit(ctx.device):
        log_progress(f"blocks 0 to {layer - 1} could run once per example, but {needed >> 20:,} MiB are more than "
                     f"{SHARE:.0%} of the memory")
        return None
    trunk = Trunk(layer)
    trunk.read(ctx, examples)
    log_progress(f"blocks 0 to {layer - 1} run once per example: {needed / 2 ** 20:,.1f} MiB are kept")
    return trunk
