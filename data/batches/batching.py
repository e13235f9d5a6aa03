"""data/batches/batching.py: which examples form a step, and how they become two tensors.

    plan                    lengths -> steps: lists of examples of similar length, in random order
    step_sizes              how many examples each step of an epoch has
    split_by_token_budget   a step -> micro-batches under a budget of padded tokens (rows x longest)
    collate                 examples -> x, y (B, T); y[b, t] is the target of position t, -1 for none
    blocks                  a stream of ids -> the starts of an epoch's windows

Every order is a pure function of (seed, epoch), so no data state is saved or restored.

Grouping by length. The whole epoch is sorted by length, each length scaled by a random factor of up to 1.05,
and cut into steps; the steps are shuffled. Two things make the steps of different epochs differ: the random
factor, and the position of the one short step (n is rarely a multiple of the batch), which shifts all steps
behind it; the short step comes last. Deviation from the usual sorting within pools of 50 steps: less padding.

The loss of a step is a mean over its targets, so an example in a step of 2 weighs 8 times as much as in one of
16. A short step of less than half of the batch is therefore not made: all steps of such an epoch have about
the same size.

Public: plan, step_sizes, split_by_token_budget, collate, blocks, padding_waste
"""
import numpy as np
import torch

JITTER = 0.05                                           # lengths are scaled by up to 1.05 before sorting


def _generator(seed, epoch):
    sign = int(seed < 0)                                # numpy takes no negative seeds
    return np.random.default_rng([sign, abs(int(seed)), int(epoch)])


def step_sizes(n, batch):
    """The number of examples in each step of an epoch of n, an array (steps,), the smallest last.

    All are `batch` but the last, which has at least half as many; where the rest of n is less, the sizes
    differ by one at most.
    """
    n_steps = -(-n // batch)
    rest = n - (n_steps - 1) * batch
    if n_steps > 1 and 2 * rest < batch:
        sizes = np.full(n_steps, n // n_steps)
        sizes[:n % n_steps] += 1
        return sizes
    sizes = np.full(n_steps, batch)
    sizes[-1:] = rest
    return sizes


def plan(lengths, batch, seed, epoch, group=True):
    """The steps of an epoch: lists of indices into lengths, every index once; see step_sizes.

    group=False: random steps instead of steps of similar length.
    """
    n = len(lengths)
    if n == 0:
        return []
    rng = _generator(seed, epoch)
    if group:
        order = np.argsort(lengths * (1 + JITTER * rng.random(n)))
    else:
        order = rng.permutation(n)
    sizes = step_sizes(n, batch)
    n_steps = len(sizes)
    short = rng.integers(n_steps)
    sizes = np.roll(sizes, short + 1)                   # the smallest is number `short`
    steps = np.split(order, sizes.cumsum()[:-1])
    shuffled = [steps[i].tolist() for i in rng.permutation(n_steps) if i != short]
    return [*shuffled, steps[short].tolist()]


def split_by_token_budget(indices, lengths, tokens):
    """Micro-batches of indices, shortest first, with rows x longest <= tokens each.

    An example longer than the budget forms a micro-batch of its own.
    """
    parts = []
    for i in sorted(indices, key=lambda i: lengths[i]):
        fits = parts and (len(parts[-1]) + 1) * lengths[i] <= tokens
        if not fits:
            parts.append([])
        parts[-1].append(i)
    return parts


def collate(examples, pad=0):
    """x, y (B, T) int64, right-padded, of (ids, mask) pairs. The shift by one happens here and nowhere else.

    A causal model never attends to the right, so `pad` may be any valid id: padding is recognised by length.
    """
    B = len(examples)
    T = max(1, max(len(ids) for ids, _ in examples) - 1)
    x = np.full((B, T), pad)
    y = np.full((B, T), -1)
    for b, (ids, mask) in enumerate(examples):
        n = len(ids) - 1                                # the last token is only a target
        x[b, :n] = ids[:-1]
        y[b, :n] = np.where(mask[1:], ids[1:], -1)      # mask[i] belongs to the target i, not to its position
    return torch.from_numpy(x), torch.from_numpy(y)


def blocks(length, block, seed, epoch):
    """Starts of an epoch's windows over a stream, shuffled. A window is stream[start:start + block + 1].

    A window has `block` targets, and no token is a target twice. The first window starts at a random
    offset, so that the windows of different epochs differ; their number is always the same. A stream
    shorter than one window gives one start, 0, and a short window.
    """
    rng = _generator(seed, epoch)
    n = max(1, (length - block) // block)
    offset = rng.integers(min(block, max(1, length - n * block)))
    return (offset + block * rng.permutation(n)).tolist()


def padding_waste(steps, lengths):
    """The fraction of padded tokens that are padding: 1 - real / (rows x longest), over all steps."""
    real = 0
    padded = 0
    for step in steps:
        real += sum(lengths[i] for i in step)
        padded += len(step) * max(lengths[i] for i in step)
    return 1 - real / padded
