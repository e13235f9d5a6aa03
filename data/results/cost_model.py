"""data/results/cost_model.py: what a training step costs, on paper: bytes on one device, and arithmetic per token.

    memory  = weights + learning + activations + the larger of logits and one block's gradients
    weights     2 or 4 bytes each as stored; int8 8.5 bits, nf4 4.5. full in half precision: 2 each for casts
    learning    16 bytes for each fp32 number that learns: itself, its gradient, Adam's two moments
    activations what backward needs of a block, times blocks, times padded tokens of a micro-batch: `kept`
                --checkpoint: the input of each block, and one block whole
    logits      12 bytes x vocabulary x supervised tokens (log-probabilities, their gradient, its product);
                under a frozen head 128 tokens at a time
    --shard     what learns, over all devices; two blocks and the embeddings are whole on each, 8 bytes each
    flops   = 2 for each weight of a Linear and token forward, 2 back through it, 2 for its own gradient if it
              learns, 2 more with --checkpoint; attention 4 S Q a block forward, twice that back; left out
              is the encoder of a soft prompt, which runs once a step
    PPO     = N (1 + 9 p) numbers: one base; policy and critic 4 p each, the reward model p (Santacroce et al.
              2023, arXiv 2309.00754). Generation: 2 L nkv hs numbers of cache for each token of each row.

`kept` counts, tensor by tensor, what autograd saves in model.py and lora.py; a frozen Linear saves nothing of
its input, an adapter its own input in fp32. tests/test_scale.py holds it to torch's own allocations.
Of CUDA it takes fused norms and attention that keep no scores; not counted are its context, its libraries'
workspace, fragmentation.

C width  Q = nh hs  K = nkv hs  I width of the MLP  V vocabulary  L blocks  S columns that a query sees
Public: Shape, Plan, planned, linears, count, adapter, kept, memory, flops, cache, SHAPES
"""
import pathlib
import sys
from typing import NamedTuple

if __name__ == "__main__":                              # run as a script: find our own files from the root
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent.parent)

from data.runtime.distributed import world
from data.batches.examples import Ranking, size, targets
from data.runtime.flags import LORA
from data.runtime.flags import ranges


class Shape(NamedTuple):
    """The fields of model.GPTConfig that cost anything; a GPTConfig will do in its place."""
    vocab_size: int
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_size: int
    n_inner: int
    tied: bool = False
    norm: str = "rmsnorm"
    mlp: str = "swiglu"


class Plan(NamedTuple):
    """What is trained, in which precision, on how much text at once."""
    method: str                     # full; lora, adalora, ia3; or a soft prompt
    learn: int                      # numbers that learn
    tokens: int                     # padded tokens of a micro-batch, and of its longest row
    row: int
    supervised: int                 # of these tokens, those whose logits are computed at once
    size: int = 2                   # bytes of a number in the arithmetic: 2 or 4
    targets: tuple = ()             # adapted words: q k v o up gate down
    rank: int = 8
    dora: bool = False
    quant: str = "none"
    front: int = 0                  # virtual tokens in front of the text
    depth: int = None               # blocks that backward goes through; None: all
    checkpoint: bool = False
    device: str = "cuda"            # a CPU keeps more: norms in fp32, attention in bf16 written out
    world: int = 1                  # processes
    shard: bool = False


def planned(kit, cfg, learn, examples, block):
    """The largest micro-batch of a run. examples: some to judge by; raw text is one stream of ids instead, or
    none yet: then a row is `block` tokens, all of them supervised."""
    said = tokens = row = block
    many = len(examples[0].answers) if examples and isinstance(examples[0], Ranking) else 1
    if examples and not isinstance(examples[0], int):
        row, tokens = max(map(size, examples)), sum(map(size, examples))
        said = sum(map(targets, examples))
        if many > 1:                                # a reward model has no logits, DPO has those of answers
            said = sum(len(ids) for e in examples for ids in e.answers) * (cfg.task == "dpo")
    rows, head = max(1, min(cfg.batch, kit.micro // row)), kit.text.by == "head"
    words = tuple(word for word in cfg.targets.split(",") if word != "head") if cfg.method in LORA else ()
    return Plan(cfg.method, sum(p.numel() for p in learn.values()), rows * row, row // many,
                0 if head else round(rows * row * said / tokens), kit.dtype.itemsize, words, cfg.rank,
                cfg.dora, cfg.quant, kit.prompt.front if kit.prompt is not None else 0,
                kit.model.config.n_layer - min(ranges(cfg.layers) or [0]), kit.checkpoint, kit.device.type,
                world.size, cfg.shard)


def linears(c):
    """{word: (in, out)} of a block's Linears."""
    Q, K, C = c.n_head * c.head_size, c.n_kv_head * c.head_size, c.n_embd
    out = dict(q=(C, Q), k=(C, K), v=(C, K), o=(Q, C), up=(C, c.n_inner), down=(c.n_inner, C))
    return out | (dict(gate=(C, c.n_inner)) if c.mlp == "swiglu" else {})


def count(c):
    """(weights of all blocks' Linears, all weights). Norms and biases are left out: a thousandth."""
    blocks = c.n_layer * sum(a * b for a, b in linears(c).values())
    return blocks, blocks + c.vocab_size * c.n_embd * (1 if c.tied else 2)


def adapter(c, targets, rank):
    """Numbers of a LoRA."""
    return c.n_layer * rank * sum(sum(linears(c)[word]) for word in targets)


def written_out(plan):
    """Is attention's softmax kept? Only where a CPU learns in bf16, see model.attend."""
    return plan.device == "cpu" and plan.size == 2 and plan.row + plan.front <= 512


def kept(c, plan, asked=1.0):
    """Bytes that backward needs of one block, for each padded token. asked: of the last block only this share
    of the tokens goes through o and the MLP."""
    n, C, I, Q, K = plan.size, c.n_embd, c.n_inner, c.n_head * c.head_size, c.n_kv_head * c.head_size
    full, S, wide = plan.method == "full", plan.row + plan.front, linears(c)
    stream = 4 if full else n                       # fp32 weights make an fp32 residual stream
    rms_cpu = c.norm == "rmsnorm" and plan.device == "cpu" and stream == 2          # an fp32 copy
    total = (1 + asked) * C * (4 if rms_cpu else stream)
    if plan.device == "cuda" and (plan.front or n == 4):            # each head gets its own k, v
        K = Q
    total += n * (Q + 2 * K * S / plan.row) + (c.n_head * S * (4 + n) if written_out(plan) else
                                               n * Q + 4 * c.n_head)
    total += n * I * (3 if c.mlp == "swiglu" else 1) * asked
    part = {w: 1.0 if w in "qkv" else asked for w in wide}
    if full and n == 4:                             # q, k and v share theirs; that of o is attention's own
        total += 4 * (C + asked * (C + I))
    elif full:                                      # autocast casts for each Linear anew
        total += n * (sum(wide[w][0] * part[w] for w in wide if w != "o") + Q * written_out(plan) * asked)
    elif plan.method == "ia3":                      # what is rescaled: of down its input
        total += n * sum(wide[w][w != "down"] * part[w] for w in plan.targets)
    elif plan.targets:
        same = {"q": 1, "k": 1, "v": 1, "up": 2, "gate": 2, "down": 3, "o": 4}
        if n == 4:                                  # one tensor for all that read it; o's is there already
            total += 4 * sum({same[w]: wide[w][0] * part[w] for w in plan.targets if w != "o"}.values())
        else:                                       # each adapter has its own copy, in fp32
            total += 4 * sum(wide[w][0] * part[w] for w in plan.targets)
        total += sum(4 * plan.rank * part[w] + (4 + n) * wide[w][1] * part[w] * plan.dora
                     for w in plan.targets)
    return total


def memory(c, plan):
    """{part: bytes} on one device at the peak of a step of several micro-batches, their sum under "total"."""
    n, full = plan.size, plan.method == "full"
    (blocks, total), L, C = count(c), c.n_layer, c.n_embd
    depth, share = L if plan.depth is None else plan.depth, plan.world if plan.shard else 1
    bits = {"none": 8 * n, "int8": 8.5, "nf4": 4.5}[plan.quant]
    weights = 0 if full else blocks * bits / 8 + (total - blocks) * n
    if full and n == 2:                             # what a Linear multiplies with, kept for backward
        weights += 2 * (blocks / (L if plan.checkpoint else 1) + c.vocab_size * C)
    learning = 16 * plan.learn / share
    if plan.shard:                                  # whole, with a gradient: this block, the next, the ends
        weights += 8 * (2 * blocks / L + total - blocks)
    largest = max(a * b for a, b in linears(c).values())
    mlp = n * c.n_inner * (3 if c.mlp == "swiglu" else 2)
    gradient = plan.tokens * (mlp + 2 * n * C)                          # in flight, in the MLP, or in
    if written_out(plan):                                               # attention, when the MLP's are gone
        gradient = max(gradient, plan.tokens * (10 * c.n_head * (plan.row + plan.front) - mlp))
    if plan.quant != "none":                        # one Linear at a time is dense
        gradient += largest * (8 + n)
    asked = min(1.0, plan.supervised / plan.tokens)
    logits = 12 * c.vocab_size * (plan.supervised if full else min(plan.supervised, 128))
    one = kept(c, plan) * plan.tokens
    if plan.front:                                  # behind a past attention needs a mask, one a block
        one += plan.row * (plan.row + plan.front) * (4 if plan.device == "cpu" else n)
    activations = depth * one - (kept(c, plan) - kept(c, plan, asked)) * plan.tokens
    peak = max(logits, gradient)
    if plan.checkpoint:
        activations = depth * plan.tokens * C * (4 if full else n)
        peak = max(logits, one + gradient)
    if full:                                        # the head's own gradient, before it is added up
        peak += 4 * c.vocab_size * C
    parts = dict(weights=weights, learning=learning, activations=activations, peak=peak)
    return parts | {"total": sum(parts.values())}


def flops(c, plan):
    """Multiplications and additions of a training step for each real token."""
    (blocks, _), L, Q = count(c), c.n_layer, c.n_head * c.head_size
    depth = L if plan.depth is None else plan.depth
    head = c.vocab_size * c.n_embd * plan.supervised / plan.tokens
    # Causal: a query sees half of a row, but behind a past a mask says so, and then all is multiplied.
    attention = 4 * Q * (plan.row + plan.front) if plan.front else 2 * Q * plan.row
    again, back = 2 if plan.checkpoint else 1, 2 if plan.method == "full" else 1
    block, asked = 2 * blocks / L, min(1.0, plan.supervised / plan.tokens)
    idle = (1 - asked) * 2 * sum(a * b for w, (a, b) in linears(c).items() if w not in "qkv")   # last block
    work = L * (block + attention)
    work += depth * ((again - 1) * (block + attention) + back * block + 2 * attention)
    return work - (again + back) * idle + 2 * head * (1 + back) + 6 * plan.learn * bool(plan.targets)


def cache(c, tokens, size=2):
    """Bytes of keys and values of so many tokens in generation."""
    return 2 * c.n_layer * c.n_kv_head * c.head_size * tokens * size


SHAPES = {"1B": Shape(128256, 16, 2048, 32, 8, 64, 8192, tied=True),    # Llama 3's: 3.2, 3.1 and 3.1
          "8B": Shape(128256, 32, 4096, 32, 8, 128, 14336),
          "70B": Shape(128256, 80, 8192, 64, 8, 128, 28672)}


def main(rate=4e14):
    """The table of README.md. rate: bf16 FLOP a second that one GPU really does, an assumption."""
    print("| model | `--method` | GB | with `--checkpoint` | fits GB | 8 GPUs | 64 GPUs | GFLOP a token | "
          "10^9 tokens on 1, 8, 64 GPUs |")
    print("|---" * 9 + "|")
    words = ("q", "v", "up", "down")                # the defaults of --method lora, and of --micro
    for name, c in SHAPES.items():
        for method, quant in (("full", "none"), ("lora", "none"), ("lora", "nf4"), ("ptuning2", "none")):
            learn = {"full": count(c)[1], "lora": adapter(c, words, 8),
                     "ptuning2": 20 * cache(c, 1, 1)}[method]
            plan = Plan(method, learn, 4096, 1024, 1024, 2, words * (method == "lora"), quant=quant,
                        front=20 * (method == "ptuning2"))
            spare = plan._replace(checkpoint=True)
            one, less = (memory(c, p)["total"] / 1e9 for p in (plan, spare))
            parted = [f"{memory(c, spare._replace(world=w, shard=True))['total'] / 1e9:,.0f}"
                      if method == "full" else "same" for w in (8, 64)]
            fits = [f"{size}" for size in (24, 80) if less + 1 < size]          # 1: the CUDA context
            work = flops(c, spare)
            days = ", ".join(f"{work * 1e9 / rate / w / 3600:,.1f}" for w in (1, 8, 64))
            label = f"{method}{' --quant nf4' if quant == 'nf4' else ''}"
            print(f"| {name} | `{label}` | {one:,.0f} | {less:,.0f} | {', '.join(fits) or 'neither'} | "
                  f"{' | '.join(parted)} | {work / 1e9:,.1f} | {days} h |")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
