"""lora.py: change a frozen Linear by a few numbers.

    y = x W^T + b             the Linear, frozen for ever; W (out, in)          D = drop(x), else x in eval
    lora      y + s D A^T B^T                         A (r, in) random  B (out, r) = 0    s = alpha / r      [1]
     rslora   the same, s = alpha / sqrt(r): rank sweeps at one alpha stay comparable                        [2]
     lora+    the same, B learns `lora_plus` times faster than A (param_groups)                              [3]
     pissa    y + s D A^T B^T - s x A0^T B0^T         A, B start at A0, B0: s B0 A0 = top r of W's SVD       [4]
    dora      y + (g - 1) x W^T + g s D A^T B^T       g = m / |W + s B A|, m (out) = |W|: norms of rows,     [5]
                                                      |.| is a constant in backward; b is not rescaled
    adalora   y + s (D A^T * E) B^T                   E (r) = 0, s = alpha / (r + 1e-5) at the *first* r     [6]
              total loss adds gamma * orthogonality(model); RankAllocator spends the rank budget, see there
    ia3       y * l           or, for `down`,  (x * l) W^T + b                  l = 1                        [7]
    quantise  W ~ absmax of 64 weights * code, code in int8 or in 16 normal quantiles (nf4)                  [8]

[1] Hu et al. 2021 (arXiv 2106.09685) section 4.1   [2] Kalajdzievski 2023 (2312.03732)   [3] Hayou et al. 2024
(2402.12354)   [4] Meng et al. 2024 (2404.02948)   [5] Liu et al. 2024 (2402.09353) eq. 5 and section 4.3
[6] Zhang et al. 2023 (2303.10512)   [7] Liu et al. 2022 (2205.05638)   [8] Dettmers et al. 2023 (2305.14314)

Every kind starts at the base model, exactly, and a switched-off adapter leaves the base model, exactly.
Deviations: q, k and v each own an A. A fused GPT-2 `c_attn` adapter of peft is read as three branches sharing
one A (the same model, the same gradients); ours is written as diagonal blocks of c_attn, rank the sum. PiSSA
leaves W alone and subtracts its start instead; its file is the exact delta, a plain LoRA of rank 2r. DoRA's
middle term sees the undropped x (peft drops it, at the price of a second dense product).
Adapters are fp32 whatever the base is. Cast, quantise and fingerprint the base before the first inject.

r rank  in, out  widths of the Linear
Public: inject, disabled, use, merge, save_adapter, load_adapter, adapter_parameters, param_groups, quantise,
base_fingerprint, RankAllocator, orthogonality, budget
"""
import copy
import math
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.files import DataError, UserError
from data.peft import fuse, read_adapter, split, write_adapter


# -------------------------------------------------------------------------------------- one adapted Linear

class LoRALinear(nn.Linear):
    """A Linear that adopts an existing weight and bias, so no base name changes, and may carry named adapters.

    One adapter at a time is live (`inject`, `use`, `disabled` say which). The weight may live as codes: `quant`.
    """

    def __init__(self, linear):
        nn.Module.__init__(self)                                # nn.Linear's own would draw a new weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.training = linear.weight, linear.bias, linear.training
        self.quant, self.adapters, self.live = None, nn.ModuleDict(), None

    def dense(self, dtype):                                     # (out, in)
        return self.weight.to(dtype) if self.quant is None else self.quant(dtype)

    def frozen(self, x):                                        # (..., in) -> (..., out)
        if self.quant is None:
            return F.linear(x, self.weight, self.bias)
        return QuantProduct.apply(x, self.quant, self.bias)

    def forward(self, x):
        return self.adapters[self.live](x, self) if self.live in self.adapters else self.frozen(x)


def compute_dtype(x, like):
    """The dtype of an adapter's arithmetic: its own (fp32), unless the caller asked for autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like


class LoRA(nn.Module):
    def __init__(self, linear, rank, scale=1.0, dropout=0.0, generator=None):
        super().__init__()
        bound = 1 / math.sqrt(linear.in_features)               # kaiming_uniform(a=sqrt 5), as everyone does
        a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A, self.lora_B = owned(linear, a), owned(linear, torch.zeros(linear.out_features, rank))
        self.scale, self.drop = scale, nn.Dropout(dropout)

    def branch(self, x, A, B):                                  # (..., in) -> (..., r) -> (..., out)
        return F.linear(F.linear(x.to(compute_dtype(x, A.dtype)), A) * self.scale, B)

    def forward(self, x, linear):
        y = linear.frozen(x)
        return y + self.branch(self.drop(x), self.lora_A, self.lora_B).to(y.dtype)

    def factors(self):
        """(A, B) of the plain LoRA that this adapter amounts to."""
        return self.lora_A, self.lora_B

    def merged(self, W, b):
        A, B = self.factors()
        return W + self.scale * (B @ A), b


class PiSSA(LoRA):
    def __init__(self, linear, rank, scale=1.0, dropout=0.0, generator=None):
        super().__init__(linear, rank, scale, dropout, generator)
        U, S, Vh = torch.linalg.svd(linear.dense(torch.float32), full_matrices=False)
        root = (S[:rank] / scale).sqrt()                        # shared evenly, so A and B learn alike
        self.register_buffer("lora_A0", (root[:, None] * Vh[:rank]).to(self.lora_A))
        self.register_buffer("lora_B0", (U[:, :rank] * root).to(self.lora_B))
        self.lora_A.data.copy_(self.lora_A0)
        self.lora_B.data.copy_(self.lora_B0)

    def forward(self, x, linear):
        y = linear.frozen(x)
        learned = self.branch(self.drop(x), self.lora_A, self.lora_B)
        return y + (learned - self.branch(x, self.lora_A0, self.lora_B0)).to(y.dtype)

    def factors(self):
        return torch.cat((self.lora_A, self.lora_A0)), torch.cat((self.lora_B, -self.lora_B0), 1)


@torch.no_grad()
def row_norm(W, A, B, s):
    """|W + s B A| of each row (out,), without that matrix: |w|^2 + 2 s <w A^T, b> + s^2 <b A A^T, b>."""
    W = W.to(A.dtype)
    square = W.square().sum(1) + 2 * s * (W @ A.T * B).sum(1) + s * s * (B @ (A @ A.T) * B).sum(1)
    return square.clamp_min(torch.finfo(A.dtype).tiny).sqrt()


class DoRA(LoRA):
    def __init__(self, linear, rank, scale=1.0, dropout=0.0, generator=None):
        super().__init__(linear, rank, scale, dropout, generator)
        W = linear.dense(self.lora_A.dtype)
        self.lora_magnitude_vector = nn.Parameter(row_norm(W, self.lora_A, self.lora_B, scale))    # (out,)

    def gain(self, W):                                          # (out,); exactly 1 at the start
        return self.lora_magnitude_vector / row_norm(W, self.lora_A, self.lora_B, self.scale)

    def forward(self, x, linear):
        y, g = linear.frozen(x), self.gain(linear.dense(self.lora_A.dtype))
        product = y if linear.bias is None else y - linear.bias
        delta = (g - 1) * product + g * self.branch(self.drop(x), self.lora_A, self.lora_B)
        return y + delta.to(y.dtype)

    def merged(self, W, b):
        return self.gain(W)[:, None] * super().merged(W, b)[0], b


class AdaLoRA(LoRA):
    """B E A is an SVD in the making: B and A are kept near orthonormal, E holds the singular values."""

    def __init__(self, linear, rank, scale=1.0, dropout=0.0, generator=None):
        super().__init__(linear, rank, scale, dropout, generator)
        for p in (self.lora_A, self.lora_B):
            p.data.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator))
        self.lora_E = owned(linear, torch.zeros(rank, 1))

    def forward(self, x, linear):
        y = linear.frozen(x)
        return y + self.branch(self.drop(x), *self.factors()).to(y.dtype)

    def factors(self):
        return self.lora_A * self.lora_E, self.lora_B


class IA3(nn.Module):
    def __init__(self, linear, inputs):
        super().__init__()
        self.inputs = inputs                                    # rescale what goes in, else what comes out
        self.ia3_l = owned(linear, torch.ones(linear.in_features if inputs else linear.out_features))

    def forward(self, x, linear):
        if self.inputs:
            return linear.frozen((x * self.ia3_l).to(x.dtype))
        y = linear.frozen(x)
        return (y * self.ia3_l).to(y.dtype)

    def merged(self, W, b):
        if self.inputs:
            return W * self.ia3_l, b
        return W * self.ia3_l[:, None], None if b is None else b * self.ia3_l


KINDS = {"lora": LoRA, "pissa": PiSSA, "dora": DoRA, "adalora": AdaLoRA, "ia3": IA3}


def owned(linear, tensor):
    """A parameter beside this Linear: on its device, and at least fp32 whatever the Linear is stored in."""
    like = linear.weight if linear.quant is None else linear.quant.codes
    return nn.Parameter(tensor.to(like.device, torch.promote_types(like.dtype, torch.float32)))


# ----------------------------------------------------------------------------------- inject, choose, merge

def linears(model):
    """{path: Linear} of the whole model; the last word of a path (q k v o up gate down head) is what users say."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def adapters(model, name=None):
    """{(path, name): adapter} of the adapters called `name`, or of all."""
    return {(path, n): a for path, m in linears(model).items() if isinstance(m, LoRALinear)
            for n, a in m.adapters.items() if name in (None, n)}


def known(model, name):
    if name is not None and not adapters(model, name):
        have = sorted({n for _, n in adapters(model)})
        raise UserError(f"no adapter is called {name!r} here; this model has {' '.join(have) or 'none'}")


def adopt(model, path):
    """The LoRALinear at `path`, put there if it is still a plain Linear."""
    linear = model.get_submodule(path)
    if not isinstance(linear, LoRALinear):
        linear = LoRALinear(linear)
        setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], linear)
    return linear


def attach(model, made, name, trainable=True):
    """Add {path: adapter} under `name`, make it the live one, and freeze everything that is no adapter."""
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise UserError(f"{name!r} cannot name an adapter; use letters, digits and _ (policy, value, ...)")
    if adapters(model, name):
        raise UserError(f"this model already has an adapter called {name!r}; choose another name")
    for path, adapter in made.items():
        adopt(model, path).adapters[name] = adapter.train(model.training).requires_grad_(trainable)
    ours = {id(p) for a in adapters(model).values() for p in a.parameters()}
    for p in model.parameters():
        if id(p) not in ours:
            p.requires_grad_(False)             # no gradient below the lowest adapter: nothing there asks for one
    for m in linears(model).values():
        if isinstance(m, LoRALinear):
            m.live = name


def inject(model, targets=("q", "v"), rank=8, alpha=16, dropout=0.0, kind="lora", rslora=False, dora=False,
           pissa=False, layers=None, rank_map=None, name="default", seed=0):
    """Put new adapters on every Linear whose last word is in `targets`, and freeze the rest of the model.

    kind      "lora" (with rslora, or one of dora, pissa), "adalora", or "ia3" (no rank, alpha, dropout)
    layers    block indices, None for all;  rank_map  {word or full path: rank} where it differs from `rank`
    seed      of the adapters' own generator: adding an adapter shifts no other random number
    Returns the paths adapted, like "blocks.0.attn.q".
    """
    if kind not in ("lora", "adalora", "ia3"):
        raise UserError(f"adapter kind {kind!r} is unknown; lora, adalora and ia3 are")
    if kind != "lora" and (rslora or dora or pissa) or dora and pissa or kind == "ia3" and (dropout or rank_map):
        raise UserError("rslora, dora and pissa belong to kind lora (dora and pissa exclude each other); "
                        "ia3 takes no dropout and no rank_map")
    if not (alpha > 0 and 0 <= dropout < 1):
        raise UserError(f"alpha must be positive and dropout in [0, 1), not {alpha} and {dropout}")
    found, rank_map = linears(model), rank_map or {}
    words = list(dict.fromkeys(path.rpartition(".")[2] for path in found))
    targets = targets.split(",") if isinstance(targets, str) else list(targets)
    if unknown := [t for t in targets if t not in words] or ["nothing"] * (not targets):
        raise UserError(f"targets: {unknown[0]!r} matches nothing in this model; it has {' '.join(words)}")
    if unknown := [t for t in rank_map if t not in words and t not in found]:
        raise UserError(f"rank_map: {unknown[0]!r} matches nothing; say a word ({' '.join(words)}) or a full path")
    depth = len(model.blocks)
    layers = range(depth) if layers is None else list(layers)
    if wrong := [i for i in layers if i not in range(depth)]:
        raise UserError(f"layers: there is no block {wrong[0]}; this model has 0-{depth - 1}")
    inside = tuple(f"blocks.{i}." for i in layers)
    generator, made = torch.Generator().manual_seed(seed), {}
    for path, linear in found.items():
        word = path.rpartition(".")[2]
        if word not in targets or path.startswith("blocks.") and not path.startswith(inside):
            continue
        r, most = rank_map.get(path, rank_map.get(word, rank)), min(linear.in_features, linear.out_features)
        if kind != "ia3" and not 1 <= r <= most:
            raise UserError(f"rank {r} does not fit {path}, which takes 1 to {most}")
        s = alpha / (r + 1e-5 if kind == "adalora" else math.sqrt(r) if rslora else r)
        linear = adopt(model, path)
        made[path] = (IA3(linear, inputs=word == "down") if kind == "ia3" else
                      KINDS["dora" if dora else "pissa" if pissa else kind](linear, r, s, dropout, generator))
        made[path].rslora = rslora
    if not made:
        raise UserError(f"targets {','.join(targets)} matches nothing in layers {layers}")
    attach(model, made, name)
    return list(made)


@contextmanager
def use(model, name):
    """While inside, the adapter called `name` is live (None: none is). With activation checkpointing run
    backward inside too: it recomputes the forward, and would find another adapter."""
    known(model, name)
    before = [(m, m.live) for m in linears(model).values() if isinstance(m, LoRALinear)]
    try:
        for m, _ in before:
            m.live = name
        yield
    finally:
        for m, live in before:
            m.live = live


def disabled(model):
    """While inside, the model is its frozen base: PPO's reference policy for free."""
    return use(model, None)


def adapter_parameters(model, name=None):
    """{state_dict name: Parameter} of the adapters called `name`, or of all; a shared A or E is there once."""
    ours = {id(p) for a in adapters(model, name).values() for p in a.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) in ours}


def param_groups(model, lr, lora_plus=1.0, weight_decay=0.0, name=None):
    """Optimiser groups of the trainable adapter parameters. B learns `lora_plus` times faster (LoRA+); decay pulls
    A and B only: an IA3 vector, a magnitude or a singular value pulled to 0 is damage, not regularisation."""
    groups = [("lora_A", lr, weight_decay), ("lora_B", lr * lora_plus, weight_decay),
              (("lora_E", "lora_magnitude_vector", "ia3_l"), lr, 0.0)]
    named = [(n, p) for n, p in adapter_parameters(model, name).items() if p.requires_grad]
    out = [dict(params=[p for n, p in named if n.endswith(leaf)], lr=rate, weight_decay=decay)
           for leaf, rate, decay in groups]
    return [g for g in out if g["params"]]


@torch.no_grad()
def merge(model):
    """A plain fp32 copy of the model with its live adapter folded into the weights.

    fp32, because a delta drowns in bf16: at |delta| = 1e-3 |W| three entries in four would not change. A copy,
    because subtracting is not the inverse of adding. A quantised base is dequantised: that is what the adapter
    was trained against. An adapted tied head is untied, so the embedding stays what it was.
    """
    if not any(m.live in m.adapters for m in linears(model).values() if isinstance(m, LoRALinear)):
        raise UserError("merge: no adapter is live in this model, so there is nothing to merge")
    model = copy.deepcopy(model)
    for path, m in linears(model).items():
        if isinstance(m, LoRALinear):
            plain = nn.Linear(m.in_features, m.out_features, device="meta")     # draws no random weights
            plain.weight, plain.bias, plain.training = m.weight, m.bias, m.training
            if m.quant is not None:
                plain.weight = nn.Parameter(m.quant(torch.float32))
            if m.live in m.adapters:
                wide = torch.promote_types(plain.weight.dtype, torch.float32)
                b = None if m.bias is None else m.bias.to(wide)
                W, b = m.adapters[m.live].merged(plain.weight.to(wide), b)
                plain.weight, plain.bias = nn.Parameter(W), None if b is None else nn.Parameter(b)
                if path == "head" and model.config.tied:
                    model.config = replace(model.config, tied=False)
            setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], plain)
    return model.to(torch.promote_types(model.wte.weight.dtype, torch.float32))


# ------------------------------------------------------------------------------------------ quantised base

QUANTILES = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])        # (8,)
NF4 = torch.cat((QUANTILES, torch.zeros(1), torch.special.ndtri(
    1 - torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1]))).sort()[0] / QUANTILES.max()  # (16,)
PAIRS = torch.stack((NF4.repeat_interleave(16), NF4.repeat(16)), 1)     # (256, 2): byte -> its two codes


class Quantised(nn.Module):
    """A tensor as codes, blockwise relative to the largest magnitude. int8: 8.5 bits a weight. nf4: 4.5, and
    with double quantisation (the block maxima, less their mean, as int8 in blocks of 256) 4.13."""

    def __init__(self, w, kind, double=False, block=64):
        super().__init__()
        self.shape, self.kind, self.block, self.sample = w.shape, kind, block, w.flatten()[:1].clone()
        flat = w.detach().float().flatten()
        flat = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
        top = flat.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)     # (blocks,)
        unit = flat / top[:, None]                                              # in [-1, 1]
        if kind == "int8":
            codes = (unit * 127).round().to(torch.int8)
        else:                                                                   # the nearest of 16, two to a byte
            nearest = torch.bucketize(unit, ((NF4[1:] + NF4[:-1]) / 2).to(unit)).to(torch.uint8)
            codes = nearest[:, ::2] * 16 + nearest[:, 1::2]
        self.register_buffer("codes", codes)                                    # (blocks, block or block/2)
        self.register_buffer("mean", top.mean() if double else None)
        if double:
            self.top = Quantised(top - self.mean, "int8", block=256)
        else:
            self.register_buffer("top", top)

    def forward(self, dtype):                                                   # -> the tensor again
        top = self.top if self.mean is None else (self.top(torch.float32) + self.mean).clamp_min(0)
        if self.kind == "int8":
            unit = self.codes.to(dtype) / 127
        else:
            unit = F.embedding(self.codes.int(), PAIRS.to(self.codes.device, dtype)).flatten(1)
        return (unit * top.to(dtype)[:, None]).flatten()[:self.shape.numel()].view(self.shape)


class QuantProduct(torch.autograd.Function):
    """x W^T + b from codes. Backward dequantises again: autograd would keep every dense W of the forward alive."""

    @staticmethod
    def forward(ctx, x, quant, bias):
        ctx.quant = quant
        return F.linear(x, quant(compute_dtype(x, x.dtype)), bias)

    @staticmethod
    def backward(ctx, g):                                       # no gradient to the codes, none to the bias
        return g @ ctx.quant(g.dtype), None, None


def quantise(model, kind, double=False):
    """Replace the weights of every Linear in the blocks by codes ("int8" | "nf4"). Returns bits per weight."""
    if kind not in ("int8", "nf4"):
        raise UserError(f"quantise: {kind!r} is unknown; int8 and nf4 are")
    if adapters(model):
        raise UserError("quantise: quantise the base before adapters are injected: they start from its weights")
    count = bits = 0
    for path, linear in linears(model).items():
        if path.startswith("blocks."):                          # the head is often the embedding too
            linear = adopt(model, path)
            linear.quant, linear.weight = Quantised(linear.weight, kind, double), None
            count += linear.quant.shape.numel()
            bits += sum(8 * b.numel() * b.element_size() for b in linear.quant.buffers())
    return bits / count


# ------------------------------------------------------------------------------------- folders, as peft's

def base_fingerprint(model):
    """The first number of every base matrix and vector, as text: which base an adapter belongs to. Adapters,
    casts and quantisation leave it recognisable; see `same_base`."""
    values = []
    for path, m in model.named_modules():
        if isinstance(m, nn.Module) and ".adapters" not in path and not isinstance(m, Quantised):
            values += [p.flatten()[0] for p in m.parameters(recurse=False)]
            values += [m.quant.sample[0]] if getattr(m, "quant", None) is not None else []
    return " ".join([str(model.wte.weight.dtype)] + [f"{v:.7g}" for v in values])


def same_base(a, b):
    """Do two fingerprints agree, to the precision of the coarser of their dtypes?"""
    (da, *va), (db, *vb) = a.split(), b.split()
    eps = max(torch.finfo(getattr(torch, d.removeprefix("torch."))).eps for d in (da, db))
    return len(va) == len(vb) and all(math.isclose(float(x), float(y), rel_tol=4 * eps) for x, y in zip(va, vb))


def modules_of(model):
    """{their path: [our paths]}: one Linear of ours, or q, k, v where they have a fused c_attn."""
    found, out = linears(model), {}
    for path, (theirs, _) in model.hf_names().items():
        if path in found:
            out.setdefault(theirs, []).append(path)
    return out


def tensors_of(adapter, scale, fold, whole):
    """The tensors of one adapter by field, as files hold them, for a module whose scale is `scale`."""
    if isinstance(adapter, IA3):
        return {"ia3_l": adapter.ia3_l}
    A, B = adapter.factors()
    B = B * (adapter.scale / scale)
    if isinstance(adapter, DoRA):
        return {"lora_A": A, "lora_B": B, "lora_magnitude_vector": adapter.lora_magnitude_vector}
    if not isinstance(adapter, AdaLoRA):
        return {"lora_A": A, "lora_B": B}
    kept = (adapter.lora_E[:, 0] != 0) | whole                          # (r,) bool
    if fold:
        return {"lora_A": A[kept], "lora_B": B[:, kept]}
    return {"lora_A": adapter.lora_A[kept], "lora_B": B[:, kept], "lora_E": adapter.lora_E[kept], "kept": kept.tolist()}


@torch.no_grad()
def save_adapter(model, folder, base="", name="default", fold=False, extra=None):
    """Write the adapter called `name` as a peft folder.

    base   the model it belongs to: a folder or a hub name, for whoever loads it
    fold   AdaLoRA as a plain LoRA with a rank per module, which is what servers load
    extra  {name: tensor} to keep in the same file, e.g. {"score.weight": ...} of a reward model
    AdaLoRA triplets whose E is exactly 0 are left out (unless all are: an untrained adapter stays whole).
    """
    known(model, name)
    found, modules, parts = {path: a for (path, _), a in adapters(model, name).items()}, {}, {}
    first = next(iter(found.values()))
    ada = isinstance(first, AdaLoRA)
    whole = ada and not any(a.lora_E.any() for a in found.values())
    for theirs, paths in modules_of(model).items():
        mine = [found[p] for p in paths if p in found]
        if not mine:
            continue
        shared = len(mine) == len(paths) > 1 and len({id(getattr(a, "lora_A", a)) for a in mine}) == 1
        group = [found.get(p) or blank(model.get_submodule(p), first) for p in paths]
        scale = first.scale if ada else getattr(mine[0], "scale", None)     # AdaLoRA's file has one for all
        ts = [tensors_of(a, scale, fold, whole) for a in group]
        m = modules[theirs] = {**fuse(ts, shared), "scale": scale}
        if ada and not fold:
            m["kept"] = ts[0]["kept"] if shared else sum((t["kept"] for t in ts), [])
        if isinstance(first, IA3):
            m["inputs"] = mine[0].inputs
            m["ia3_l"] = m["ia3_l"][None] if m["inputs"] else m["ia3_l"][:, None]
        elif len(m["lora_A"]) == 0 and (fold or not ada):
            del modules[theirs]                                     # every triplet pruned: a plain LoRA has no rank 0
        if len(paths) > 1 and not shared:
            parts[theirs] = {p: len(t["ia3_l" if "ia3_l" in t else "lora_A"]) for p, t in zip(paths, ts) if p in found}
    kind = {IA3: "ia3", DoRA: "dora", AdaLoRA: "lora" if fold else "adalora"}.get(type(first), "lora")
    write_adapter(folder, kind, modules, model.config.family, base, getattr(first, "dropout", 0.0), first.rslora,
                  {"base_fingerprint": base_fingerprint(model), "parts": parts}, extra)


def blank(linear, like):
    """An adapter of the kind of `like` that changes nothing and, IA3's ones apart, has nothing in it."""
    linear = linear if isinstance(linear, LoRALinear) else LoRALinear(linear)
    return IA3(linear, False) if isinstance(like, IA3) else type(like)(linear, 0, like.scale)


def load_adapter(model, folder, name="default", trainable=True, force=False):
    """Read a peft folder (LoRA, DoRA, AdaLoRA, IA3) into an adapter called `name`; the rest is frozen.

    Strict: a tensor that is missing, foreign or misshaped is an error, and so is another base than the adapter
    was trained on, unless `force`. Returns the tensors saved beside the adapter, as `save_adapter`'s `extra`.
    """
    theirs = modules_of(model)
    mine = {t: [model.get_submodule(p) for p in paths] for t, paths in theirs.items()}
    sizes = {t: (ms[0].in_features, sum(m.out_features for m in ms)) for t, ms in mine.items()}
    a = read_adapter(folder, sizes, model.config.family)
    was, parts = a["side"].get("base_fingerprint"), a["side"].get("parts", {})
    if was and not force and not same_base(was, base_fingerprint(model)):
        raise DataError(f"{folder}: this adapter was trained on another base ({a['base'] or 'unnamed'}) than the one "
                        "loaded here; load that one, or force it")
    made = {}
    for t, whole in a["modules"].items():
        outs, of = [m.out_features for m in mine[t]], parts.get(t)
        pieces = split(whole, outs, of and [of.get(p, 0) for p in theirs[t]])
        first = None
        for path, piece in zip(theirs[t], pieces):
            if of is not None and path not in of:
                continue
            linear = adopt(model, path)
            if a["kind"] == "ia3":
                made[path] = IA3(linear, whole["inputs"])
            else:
                made[path] = KINDS[a["kind"]](linear, len(piece["lora_A"]), whole["scale"], a["dropout"])
            made[path].rslora = a["rslora"]
            for field, tensor in piece.items():
                if first is not None and len(pieces) > 1 and field in ("lora_A", "lora_E") and piece[field] is pieces[0][field]:
                    setattr(made[path], field, getattr(first, field))       # one A for q, k and v, as in peft
                else:
                    getattr(made[path], field).data.copy_(tensor)
            first = first or made[path]
    attach(model, made, name, trainable)
    return a["extra"]
