"""data/results/cost_model.py: the memory and the arithmetic of a training step, estimated before it runs.

    memory  = weights + trainable + activations + the larger of logits and one block's gradients     (bytes)
    weights     2 or 4 bytes each as stored; int8 8.5 bits, nf4 4.5. Full tuning in half precision: 2 each,
                for casts
    trainable   16 bytes for each fp32 number that is trained: itself, its gradient, Adam's two moments. The
                gradients of a soft prompt in front of the text come when activations are freed
    activations what backward needs of a block (`activation_bytes`), times blocks, times padded tokens of a
                micro-batch; the lowest of frozen blocks needs less (`unneeded_bytes`).
                With --gradient_checkpointing: the input of each block, and one block whole
    trunk       what enters the lowest adapter's block, of examples that are read again (data/results/trunk.py)
    logits      12 bytes x vocabulary x supervised tokens (log-probabilities, their gradient, its product);
                under a frozen head 128 tokens at a time
    --shard     `trainable` is divided by the processes; two blocks and the embeddings are whole on each, at 8
                bytes a number
    flops   = per weight of a Linear and token: 2 forward, 2 back through it, 2 for its own gradient if it is
              trained, 2 more with --gradient_checkpointing; attention 4 S Q a block forward, twice that back;
              nothing of the blocks below a trunk.
              Left out is the encoder of a soft prompt, which runs once a step
    PPO     = N (1 + 9 p) numbers: one base; policy and critic 4 p each, the reward model p (Santacroce et al.
              2023, arXiv 2309.00754). Generation: 2 L nkv hs numbers of cache for each token of each row

The costs of a method are a dict in its record (COSTS): this file knows no method's name. activation_bytes
counts, tensor by tensor, what autograd saves in model.py and lora.py: a frozen Linear saves nothing of its
input, an adapter saves its own input in fp32. tests/test_scale.py compares it with torch's own allocations.
For CUDA it assumes fused norms and attention that keeps no scores; it leaves out the context, the libraries'
workspace and fragmentation.

C width   Q = nh hs   K = nkv hs   I width of the MLP   V vocabulary   L blocks   S columns a query attends to

Public: COSTS, KINDS, Shape, Plan, planned, linears, count_numbers, count_weights, count_lora,
activation_bytes, unneeded_bytes, memory, flops, cache_bytes
"""
from typing import NamedTuple

from data.batches.examples import Ranking, Thumbs, size, targets
from data.runtime.distributed import dist_state

KINDS = ("full", "lora", "ia3", "prompt")
# A method's costs and their defaults. targets: adapted Linears, of q k v o up gate down. rank: r of each.
# keeps_output: backward needs the output of each adapted Linear (DoRA). quant: none, int8 or nf4.
# first_layer: the lowest block that holds something trainable; backward ends there.
COSTS = {"kind": "full", "targets": (), "rank": 0, "keeps_output": False, "quant": "none", "first_layer": 0}
BITS = {"int8": 8.5, "nf4": 4.5}                        # per weight, scales included


class Shape(NamedTuple):
    """The fields of model.GPTConfig that decide the costs; a GPTConfig can stand in its place."""
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
    parallel_residual: bool = False
    post_norm: bool = False


class Plan(NamedTuple):
    """What is trained, in which precision, on how much text at once."""
    kind: str                       # of KINDS
    trainable: int                  # numbers that are trained
    tokens: int                     # padded tokens of a micro-batch
    row: int                        # tokens of its longest row
    supervised: int                 # of these tokens, those whose logits are computed at once
    bytes_each: int = 2             # of a number in the arithmetic: 2 or 4
    targets: tuple = ()             # adapted words: q k v o up gate down
    rank: int = 8
    keeps_output: bool = False
    quant: str = "none"
    prefix_len: int = 0             # virtual tokens in front of the text
    depth: int = None               # blocks that backward goes through; None: all
    gradient_checkpointing: bool = False
    device: str = "cuda"            # a CPU keeps more: norms in fp32, scores of attention in bf16
    processes: int = 1
    shard: bool = False
    shared_blocks: int = 0          # blocks that run once per example, before the first step
    kept_tokens: int = 0            # of these examples together


def planned(ctx, cfg, trainable, examples, block_size, costs, logits_on_answers=False):
    """The Plan of a run's largest micro-batch.

    ctx          a data/results/evaluate.ModelContext
    cfg          the flags; read are batch and, where the task has it, shard
    trainable    {name: parameter}
    examples     some to estimate from. For raw text one stream of ids, or empty: then a row is block_size
                 tokens, all of them supervised
    costs        the method's, see COSTS
    logits_on_answers   for preferences: whether the loss needs the logits of the answers (DPO; not reward)

    Raises ValueError for costs that are not in COSTS or KINDS.
    """
    unknown = costs.keys() - COSTS.keys()
    if unknown:
        raise ValueError(f"unknown costs {', '.join(sorted(unknown))}; there are {', '.join(COSTS)}")
    costs = {**COSTS, **costs}
    if costs["kind"] not in KINDS:
        raise ValueError(f"unknown kind of costs {costs['kind']!r}; there are {', '.join(KINDS)}")
    row, answers, supervised_share = example_sizes(examples, block_size, logits_on_answers)
    if ctx.text.classifier == "head":
        supervised_share = 0.0                          # a head's logits are few
    rows = max(1, min(cfg.batch, ctx.micro_batch_tokens // row))
    return Plan(kind=costs["kind"], trainable=count_numbers(trainable.values()), tokens=rows * row,
                row=row // answers, supervised=round(rows * row * supervised_share),
                bytes_each=ctx.dtype.itemsize, targets=tuple(costs["targets"]), rank=costs["rank"],
                keeps_output=costs["keeps_output"], quant=costs["quant"],
                prefix_len=ctx.prompt.prefix_len if ctx.prompt is not None else 0,
                depth=ctx.model.config.n_layer - costs["first_layer"],
                gradient_checkpointing=ctx.gradient_checkpointing, device=ctx.device.type,
                processes=dist_state.size, shard=cfg.get("shard", False))


def example_sizes(examples, block_size, logits_on_answers):
    """(tokens of the longest example, its rows, share of the tokens whose logits are computed)."""
    if not examples or isinstance(examples[0], int):
        return block_size, 1, 1.0
    longest = max(map(size, examples))
    tokens = sum(map(size, examples))
    if not isinstance(examples[0], (Ranking, Thumbs)):
        return longest, 1, sum(map(targets, examples)) / tokens
    supervised = sum(len(ids) for example in examples for ids in example.answers) if logits_on_answers else 0
    return longest, len(examples[0].answers), supervised / tokens


# ------------------------------------------------------------------------------------------------------ sizes

def count_numbers(parameters):
    """How many numbers these tensors hold together."""
    return sum(p.numel() for p in parameters)


def linears(c):
    """{word: (in, out)} of a block's Linears."""
    C = c.n_embd
    Q = c.n_head * c.head_size
    K = c.n_kv_head * c.head_size
    sizes = {"q": (C, Q), "k": (C, K), "v": (C, K), "o": (Q, C), "up": (C, c.n_inner), "down": (c.n_inner, C)}
    if c.mlp == "swiglu":
        sizes["gate"] = (C, c.n_inner)
    return sizes


def count_weights(c):
    """(weights of all blocks' Linears, all weights). Norms and biases are left out: a thousandth."""
    blocks = c.n_layer * sum(a * b for a, b in linears(c).values())
    embeddings = c.vocab_size * c.n_embd * (1 if c.tied else 2)
    return blocks, blocks + embeddings


def count_lora(c, targets, rank):
    """Trainable numbers of a LoRA."""
    return c.n_layer * rank * sum(sum(linears(c)[word]) for word in targets)


def cache_bytes(c, tokens, bytes_each=2):
    """Bytes of keys and values of so many tokens in generation."""
    return 2 * c.n_layer * c.n_kv_head * c.head_size * tokens * bytes_each


# ----------------------------------------------------------------------------------------------------- memory

def keeps_scores(plan):
    """Whether backward needs attention's softmax: only on a CPU in bf16, see model.attend."""
    return plan.device == "cpu" and plan.bytes_each == 2 and plan.row + plan.prefix_len <= 512


def activation_bytes(c, plan, share=1.0):
    """Bytes that backward needs of one block, for each padded token.

    share   of the tokens, those that go through o and the MLP: in the last block only supervised ones do
    """
    full = plan.kind == "full"
    n = plan.bytes_each
    stream = 4 if full else n                           # fp32 weights make an fp32 residual stream
    if c.norm == "rmsnorm" and plan.device == "cpu" and stream == 2:
        stream = 4                                      # an fp32 copy
    norms = 1 + share                                   # inputs of ln_1 and ln_2
    if c.parallel_residual and share == 1:              # which is one tensor
        norms = 1
    if c.post_norm:
        norms *= 2
    total = norms * c.n_embd * stream
    total += attention_bytes(c, plan)
    total += n * c.n_inner * (3 if c.mlp == "swiglu" else 1) * share
    share_of = {word: 1.0 if word in "qkv" else share for word in linears(c)}
    if full:
        return total + full_bytes(c, plan, share_of)
    return total + adapter_bytes(c, plan, share_of)


def attention_bytes(c, plan):
    """q, k, v and what the softmax keeps, for each padded token."""
    n = plan.bytes_each
    S = plan.row + plan.prefix_len
    Q = c.n_head * c.head_size
    K = c.n_kv_head * c.head_size
    if plan.device == "cuda" and (plan.prefix_len or n == 4):
        K = Q                                           # each head gets its own k and v
    if keeps_scores(plan):
        kept = c.n_head * S * (4 + n)
    else:
        kept = n * Q + 4 * c.n_head
    return n * (Q + 2 * K * S / plan.row) + kept


def unneeded_bytes(c, plan):
    """What backward does not need of the lowest block, for each padded token; see ends_before."""
    unused = ends_before(c, plan)
    if not unused:
        return 0
    n = plan.bytes_each
    stream = 4 if c.norm == "rmsnorm" and plan.device == "cpu" else n
    unneeded = c.n_embd * stream
    if "up" in unused:
        unneeded += n * c.n_inner * (3 if c.mlp == "swiglu" else 1)
    return unneeded


def ends_before(c, plan):
    """The Linears of the lowest block through which no gradient goes, because it would end in a frozen embedding
    or a trunk. With a parallel residual an MLP without adapters is among them."""
    if plan.kind == "full" or (plan.kind == "prompt" and not plan.prefix_len):      # virtual tokens in the text
        return ()
    mlp = [word for word in linears(c) if word not in "qkvo"]
    return ("q", "k", "v", *(mlp if c.parallel_residual and not {*mlp} & {*plan.targets} else ()))


def full_bytes(c, plan, share_of):
    """Inputs that Linears with trainable weights keep, for each padded token."""
    n = plan.bytes_each
    if n == 4:                                          # q, k and v share one; o's is attention's output
        return 4 * (c.n_embd + share_of["up"] * (c.n_embd + c.n_inner))
    total = n * sum(a * share_of[word] for word, (a, _) in linears(c).items() if word != "o")
    if keeps_scores(plan):                              # autocast casts for each Linear anew
        total += n * c.n_head * c.head_size * share_of["o"]
    return total


def adapter_bytes(c, plan, share_of):
    """What adapters or rescaling vectors keep, for each padded token; a soft prompt keeps nothing."""
    n = plan.bytes_each
    sizes = linears(c)
    if plan.kind == "ia3":                              # what is rescaled: of down its input
        return n * sum(sizes[word][0 if word == "down" else 1] * share_of[word] for word in plan.targets)
    if not plan.targets:
        return 0
    inputs = {word: sizes[word][0] * share_of[word] for word in plan.targets}
    if n == 4:                                          # one tensor for all its readers; o's is kept anyway
        tensor = {"q": 1, "k": 1, "v": 1, "up": 2, "gate": 2, "down": 3}
        total = 4 * sum({tensor[word]: kept for word, kept in inputs.items() if word != "o"}.values())
    else:                                               # each adapter has its own copy, in fp32
        total = 4 * sum(inputs.values())
    for word in plan.targets:
        total += 4 * plan.rank * share_of[word]
        if plan.keeps_output:
            total += (4 + n) * sizes[word][1] * share_of[word]
    return total


def memory(c, plan):
    """{part: bytes} on one device at the peak of a step of several micro-batches, their sum under "total"."""
    full = plan.kind == "full"
    C = c.n_embd
    depth = c.n_layer if plan.depth is None else plan.depth
    head = c.vocab_size * C
    supervised_share = min(1.0, plan.supervised / plan.tokens)
    block = activation_bytes(c, plan) * plan.tokens
    skipped = block - activation_bytes(c, plan, supervised_share) * plan.tokens         # of the last block
    if plan.prefix_len:                                 # attention over a past needs a mask, one a block
        block += plan.row * (plan.row + plan.prefix_len) * (4 if plan.device == "cpu" else plan.bytes_each)
    logits = 12 * c.vocab_size * (plan.supervised if full else min(plan.supervised, 128))
    gradients = gradient_bytes(c, plan)
    if plan.gradient_checkpointing:
        activations = depth * plan.tokens * C * (4 if full else plan.bytes_each)
        peak = max(logits, block + gradients)
    else:
        activations = depth * block - skipped - unneeded_bytes(c, plan) * plan.tokens
        peak = max(logits, gradients)
    if full:                                            # the head's own gradient, before it is added up
        peak += 4 * head
    trainable = 16 * plan.trainable / (plan.processes if plan.shard else 1)
    if plan.prefix_len:
        trainable -= min(4 * plan.trainable, activations + peak)
    parts = {"weights": weight_bytes(c, plan), "activations": activations, "peak": peak, "trainable": trainable,
             "trunk": plan.kept_tokens * C * plan.bytes_each}
    return {**parts, "total": sum(parts.values())}


def weight_bytes(c, plan):
    """Frozen weights as stored; of trainable ones the casts, and what --shard keeps whole."""
    n = plan.bytes_each
    blocks, total = count_weights(c)
    weights = 0
    if plan.kind != "full":
        weights = blocks * BITS.get(plan.quant, 8 * n) / 8 + (total - blocks) * n
    elif n == 2:                                        # what a Linear multiplies with, kept for backward
        blocks_kept = blocks / c.n_layer if plan.gradient_checkpointing else blocks
        weights = 2 * (blocks_kept + c.vocab_size * c.n_embd)
    if plan.shard:                                      # whole, with gradients: two blocks and the ends
        weights += 8 * (2 * blocks / c.n_layer + total - blocks)
    return weights


def gradient_bytes(c, plan):
    """Gradients in flight inside one block: in the MLP, or in attention after those of the MLP are freed."""
    n = plan.bytes_each
    mlp = n * c.n_inner * (3 if c.mlp == "swiglu" else 2)
    total = plan.tokens * (mlp + 2 * n * c.n_embd)
    if keeps_scores(plan):
        total = max(total, plan.tokens * (10 * c.n_head * (plan.row + plan.prefix_len) - mlp))
    if plan.quant != "none":                            # one Linear at a time is dense
        total += max(a * b for a, b in linears(c).values()) * (8 + n)
    return total


# ------------------------------------------------------------------------------------------------- arithmetic

def flops(c, plan):
    """Multiplications and additions of a training step for each real token."""
    blocks = count_weights(c)[0]
    L = c.n_layer
    Q = c.n_head * c.head_size
    depth = L if plan.depth is None else plan.depth
    head = c.vocab_size * c.n_embd * plan.supervised / plan.tokens
    # Causal: a query attends to half of a row. Over a past a mask decides, and everything is multiplied.
    attention = 4 * Q * (plan.row + plan.prefix_len) if plan.prefix_len else 2 * Q * plan.row
    forwards = 2 if plan.gradient_checkpointing else 1
    backwards = 2 if plan.kind == "full" else 1
    block = 2 * blocks / L
    supervised_share = min(1.0, plan.supervised / plan.tokens)
    work = (L - plan.shared_blocks) * (block + attention)
    work += depth * ((forwards - 1) * (block + attention) + backwards * block + 2 * attention)
    work -= 2 * sum(a * b for word, (a, b) in linears(c).items() if word in ends_before(c, plan))
    after_attention = sum(a * b for word, (a, b) in linears(c).items() if word not in "qkv")
    work -= (forwards + backwards) * (1 - supervised_share) * 2 * after_attention       # of the last block
    work += 2 * head * (1 + backwards)
    if plan.targets:
        work += 6 * plan.trainable
    return work
