"""data/results/untrained.py: tokens that no training reached, and answers that need them.

A row of the head that is never a target moves with the softmax's denominator only, and all such rows end in
one place (Land & Bartolo 2024, arXiv 2405.05417). With embedding and head frozen, no adapter and no soft prompt
can give one of them a higher logit than the others: an answer that needs it cannot be learnt.

    row i coincides with row j  <=>  |w_i - w_j| < 0.1 x the distance that 9 of 10 pairs of rows do not exceed

The nearest row is found among random projections to 64 numbers (Johnson & Lindenstrauss 1984), and then its
distance is measured in full.

Public: coinciding_ids, warn
"""
import torch

from data.batches.examples import display
from data.runtime import distributed
from data.runtime.run_folder import log_progress

SHARE = 0.1
SKETCH = 64                                             # numbers of a random projection
SHOWN = 6                                               # tokens that the note names


@torch.no_grad()
def coinciding_ids(weight, ids):
    """Those of ids (int) whose row of weight (V, C) coincides with another row, sorted."""
    rows = distributed.full(weight).detach().float()
    sample = rows[torch.linspace(0, len(rows) - 1, min(len(rows), 512)).long()]
    limit = SHARE * torch.pdist(sample).quantile(0.9)
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(rows.size(1), SKETCH, generator=generator).to(rows.device) / SKETCH ** 0.5
    marks = rows @ sketch                               # (V, 64): distances to about a tenth
    found = []
    for part in torch.tensor(sorted(ids), dtype=torch.long, device=rows.device).split(256):
        apart = torch.cdist(marks[part], marks)         # (256, V)
        apart[torch.arange(len(part)), part] = torch.inf
        nearest = apart.argmin(1)
        found.append(part[(rows[part] - rows[nearest]).norm(dim=1) < limit])
    return torch.cat(found).tolist() if found else []


def answer_ids(examples):
    """The ids that examples have as targets; of a stream of ids all."""
    needed = set()
    for example in examples:
        if isinstance(example, int):
            needed.add(example)
            continue
        for _, ids, mask in display(example):
            needed.update(token for token, target in zip(ids, mask) if target)
    return needed


def warn(ctx, cfg, examples):
    """Print a note if answers need tokens whose rows coincide, while embedding and head are frozen."""
    model = ctx.model
    tunable = [*model.head.parameters(), *model.wte.parameters()]
    if ctx.text.classifier == "head" or any(p.requires_grad for p in tunable):
        return
    found = coinciding_ids(model.head.weight, answer_ids(examples))
    if not found:
        return
    tokens = ", ".join(repr(ctx.text.tokenizer.decode([i], special=True)) for i in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    targets = f"--targets {cfg.targets},head" if cfg.get("targets") else "--method lora with head in --targets"
    remedies = [targets, "--method full"]
    if ctx.text.end_token in found:
        remedies.append("another --template, whose end token is trained")
    one = len(found) == 1
    log_progress(f"answers need {len(found)} token{'' if one else 's'} that no training of {cfg.init} reached "
                 f"({tokens}{more}): with a frozen head {'it' if one else 'they'} cannot be learnt; use "
                 f"{', or '.join(remedies)}")
