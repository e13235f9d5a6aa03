"""lora.py: change a frozen Linear by a few numbers.

    y = x W^T + b            W (out, in) and b never move;       D = drop(x), in eval x
    lora     y + s D A^T B^T                  A (r, in) random   B (out, r) = 0   s = alpha / r            [1]
    rslora   the same, s = alpha / sqrt(r): a rank sweep at one alpha stays comparable                     [2]
    lora+    the same, B learns `lora_plus` times faster than A: param_groups                              [3]
    pissa    y + s D A^T B^T - s x A0^T B0^T  A, B start at A0, B0: s B0 A0 is the top r of W's SVD        [4]
    dora     y + (g - 1) x W^T + g s D A^T B^T           g = m / |W + s B A|    m (out) = |W|              [5]
             |.| norms of rows, a constant in backward; b is not rescaled
    adalora  y + s (D A^T * E) B^T            E (r) = 0   s = alpha / (r + 1e-5) at the first r, for ever  [6]
             loss + gamma * orthogonality(model); RankAllocator decides which E may live
    ia3      y * l, but for `down` (x * l) W^T + b       l = 1                                             [7]
    quantise W ~ codes times the largest of 64 weights: int8, nf4; see data/checkpoints/quantization.py                       [8]

[1] Hu et al. 2021 (arXiv 2106.09685) section 4.1   [2] Kalajdzievski 2023 (2312.03732)   [3] Hayou et al.
2024 (2402.12354)   [4] Meng et al. 2024 (2404.02948)   [5] Liu et al. 2024 (2402.09353) eq. 5, section 4.3
[6] Zhang et al. 2023 (2303.10512)   [7] Liu et al. 2022 (2205.05638)   [8] Dettmers et al. 2023 (2305.14314)

Every kind starts at the base model, exactly, and switched off it is the base model, exactly.
Deviations: q, k and v each own an A. A fused GPT-2 `c_attn` adapter of peft is read as three branches sharing
one A (the same model, the same gradients); ours is written as diagonal blocks of c_attn, its rank their sum.
PiSSA leaves W alone and subtracts its start instead; its file holds the exact change, a LoRA of rank 2r.
DoRA's middle term sees the undropped x (peft drops it, at the price of a second dense product).
Adapters are fp32 whatever the base is. Cast and quantise the base before adapters are made: they look at W.

r rank   in, out widths of the Linear
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

from data.runtime.files import UserError
from data.checkpoints.peft import base_fingerprint, fused, read_adapter, write_adapter              # noqa: F401
from data.checkpoints.quantization import Quantised, QuantProduct, compute_dtype, keep_wide


class LoRALinear(nn.Linear):
    """A Linear that adopts an existing weight and bias, so that no base name changes, and carries adapters by
    name, one of them live: see `inject`, `use`, `disabled`. Its weight may be codes instead: `quant`."""

    def __init__(self, linear):
        nn.Module.__init__(self)                                # nn.Linear's own would draw a new weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.training = linear.weight, linear.bias, linear.training
        self.quant, self.adapters, self.live = None, Adapters(), None

    def dense(self, dtype):                                     # (out, in)
        return self.weight.to(dtype) if self.quant is None else self.quant(dtype)

    def frozen(self, x):                                        # (..., in) -> (..., out)
        if self.quant is None:
            return F.linear(x, self.weight, self.bias)
        return QuantProduct.apply(x, self.quant, self.bias)

    def forward(self, x):
        return self.adapters[self.live](x, self) if self.live in self.adapters else self.frozen(x)


class Adapters(nn.ModuleDict):
    _apply = keep_wide                                          # model.bfloat16() does not reach them


def owned(linear, tensor):
    """A parameter beside this Linear: on its device, and at least fp32 whatever the Linear is stored in."""
    like = linear.weight if linear.quant is None else linear.quant.codes
    return nn.Parameter(tensor.to(like.device, torch.promote_types(like.dtype, torch.float32)))


# ---------------------------------------------------------------------------------------------- the variants

class LoRA(nn.Module):
    def __init__(self, linear, rank, scale, dropout=0.0, generator=None):
        super().__init__()
        bound = 1 / math.sqrt(linear.in_features)               # kaiming_uniform(a=sqrt 5), as everyone does
        a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A, self.lora_B = owned(linear, a), owned(linear, torch.zeros(linear.out_features, rank))
        self.scale, self.drop = scale, nn.Dropout(dropout)

    def branch(self, x, A, B):                                  # (..., in) -> (..., r) -> (..., out)
        # B turned over in memory, a small copy: backward's two products over B run four times as fast (CPU)
        return F.linear(x.to(compute_dtype(x, A.dtype)), A) * self.scale @ B.T.contiguous()

    def forward(self, x, linear):
        y = linear.frozen(x)
        return y + self.branch(self.drop(x), *self.factors()).to(y.dtype)

    def factors(self):
        """(A, B) of the plain LoRA that this adapter amounts to."""
        return self.lora_A, self.lora_B

    def merged(self, W, b):
        A, B = self.factors()
        return W + self.scale * (B @ A), b


class PiSSA(LoRA):
    def __init__(self, linear, rank, scale, dropout=0.0, generator=None):
        super().__init__(linear, rank, scale, dropout, generator)
        U, S, Vh = torch.linalg.svd(linear.dense(torch.float32).detach(), full_matrices=False)
        root = (S[:rank] / scale).sqrt()                        # shared evenly, so that A and B learn alike
        self.lora_A.data.copy_(root[:, None] * Vh[:rank])
        self.lora_B.data.copy_(U[:, :rank] * root)
        self.register_buffer("lora_A0", self.lora_A.detach().clone())
        self.register_buffer("lora_B0", self.lora_B.detach().clone())

    def forward(self, x, linear):
        y = linear.frozen(x)
        learned = self.branch(self.drop(x), self.lora_A, self.lora_B)
        return y + (learned - self.branch(x, self.lora_A0, self.lora_B0)).to(y.dtype)

    def factors(self):
        return torch.cat((self.lora_A, self.lora_A0)), torch.cat((self.lora_B, -self.lora_B0), 1)


@torch.no_grad()
def row_norm(W, A, B, s):
    """|W + s B A| by rows, without that matrix: |w|^2 + 2 s <w A^T, b> + s^2 <b A A^T, b>. Returns (out,)."""
    with torch.autocast(W.device.type, enabled=False):          # in bf16 every row would be a little off
        W = W.to(A.dtype)
        own, cross = torch.linalg.vector_norm(W, dim=1).square(), (W @ A.T * B).sum(1)
        return (own + 2 * s * cross + s * s * (B @ (A @ A.T) * B).sum(1)).clamp_min(1e-30).sqrt()


class DoRA(LoRA):
    def __init__(self, linear, rank, scale, dropout=0.0, generator=None):
        super().__init__(linear, rank, scale, dropout, generator)
        W = linear.dense(self.lora_A.dtype)
        self.lora_magnitude_vector = nn.Parameter(row_norm(W, self.lora_A, self.lora_B, scale))     # (out,)

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

    def __init__(self, linear, rank, scale, dropout=0.0, generator=None):
        super().__init__(linear, rank, scale, dropout, generator)
        for p in (self.lora_A, self.lora_B):
            p.data.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator))
        self.lora_E = owned(linear, torch.zeros(rank, 1))

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


def make(kind, linear, inputs, rank, scale, dropout, generator, rslora):
    low_rank = {"lora": LoRA, "pissa": PiSSA, "dora": DoRA, "adalora": AdaLoRA}
    a = IA3(linear, inputs) if kind == "ia3" else low_rank[kind](linear, rank, scale, dropout, generator)
    a.kind, a.rslora = kind, rslora                             # for the file; `scale` knows about rslora
    return a


# ------------------------------------------------------------------------------------- inject, choose, merge

def linears(model):
    """{path: Linear}; the last word of a path (q k v o up gate down head) is what users say."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def adapted(model):
    return {path: m for path, m in linears(model).items() if isinstance(m, LoRALinear)}


def adapters(model, name="default"):
    return {path: m.adapters[name] for path, m in adapted(model).items() if name in m.adapters}


def adopt(model, path):
    """The LoRALinear at `path`, put there if it is still a plain Linear."""
    parent, _, word = path.rpartition(".")
    parent = model.get_submodule(parent)
    if not isinstance(getattr(parent, word), LoRALinear):
        setattr(parent, word, LoRALinear(getattr(parent, word)))
    return getattr(parent, word)


def attach(model, made, name, trainable=True):
    """Add {path: adapter} as `name`, make it live, and freeze all that is no adapter: backward then stops at
    the lowest one, because nothing below asks for a gradient."""
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise UserError(f"{name!r} cannot name an adapter; use a word like policy, value or default")
    if adapters(model, name):
        raise UserError(f"this model already has an adapter called {name!r}; choose another name")
    for path, a in made.items():
        model.get_submodule(path).adapters[name] = a.train(model.training).requires_grad_(trainable)
    for n, p in model.named_parameters():
        if ".adapters." not in n:
            p.requires_grad_(False)
    for m in adapted(model).values():
        m.live = name


def inject(model, targets=("q", "v"), rank=8, alpha=16, dropout=0.0, kind="lora", rslora=False, dora=False,
           pissa=False, layers=None, rank_map=None, name="default", seed=0):
    """Put a new adapter on every Linear whose last word is in `targets`, freeze the rest, and make it live.

    kind      "lora" (with rslora, or one of dora and pissa), "adalora", or "ia3" (no rank, alpha or dropout)
    layers    block numbers, None for all       rank_map  {word or full path: rank} where it is not `rank`
    seed      of the adapter's own generator: adding an adapter shifts no other random number
    Returns the adapted paths, such as "blocks.0.attn.q".
    """
    if kind not in ("lora", "adalora", "ia3"):
        raise UserError(f"adapter kind {kind!r} is unknown; lora, adalora and ia3 are known")
    if kind != "lora" and (rslora or dora or pissa) or dora and pissa:
        raise UserError("rslora, dora and pissa are for kind lora, and dora and pissa exclude each other")
    if kind == "ia3" and (dropout or rank_map):
        raise UserError("ia3 has no branch and no rank, so it takes neither dropout nor rank_map")
    if not (alpha > 0 and 0 <= dropout < 1):
        raise UserError(f"alpha must be positive and dropout in [0, 1); they are {alpha} and {dropout}")
    found, rank_map, depth = linears(model), rank_map or {}, len(model.blocks)
    words = list(dict.fromkeys(path.rpartition(".")[2] for path in found))
    targets = targets.split(",") if isinstance(targets, str) else list(targets)
    if wrong := [t for t in targets if t not in words] + [t for t in rank_map if t not in {*words, *found}]:
        raise UserError(f"{wrong[0]!r} matches nothing in this model; it has {' '.join(words)}, and several "
                        "are told apart by commas")
    if wrong := [i for i in layers or () if i not in range(depth)]:
        raise UserError(f"there is no block {wrong[0]} in this model; layers go from 0 to {depth - 1}")
    inside = tuple(f"blocks.{i}." for i in (range(depth) if layers is None else layers))
    generator, made = torch.Generator().manual_seed(seed), {}
    variant = "dora" if dora else "pissa" if pissa else kind
    for path, m in found.items():
        word = path.rpartition(".")[2]
        if word in targets and (path.startswith(inside) or not path.startswith("blocks.")):
            r, most = rank_map.get(path, rank_map.get(word, rank)), min(m.in_features, m.out_features)
            if kind != "ia3" and not 1 <= r <= most:
                raise UserError(f"rank {r} does not fit {path}; it takes 1 to {most}")
            s = alpha / (r + 1e-5 if kind == "adalora" else math.sqrt(r) if rslora else r)
            made[path] = make(variant, adopt(model, path), word == "down", r, s, dropout, generator, rslora)
    if idle := [t for t in rank_map if not any(path == t or path.endswith(f".{t}") for path in made)]:
        raise UserError(f"rank_map gives {idle[0]!r} a rank, but targets {','.join(targets)} leave it out")
    if not made:
        raise UserError(f"targets {','.join(targets)!r} in layers {list(layers or ())} are no modules at all")
    attach(model, made, name)
    return list(made)


@contextmanager
def use(model, name):
    """While inside, the adapter called `name` is live (None: none is). With activation checkpointing, run
    backward inside too: it computes the forward again, and must find the same adapter."""
    if name is not None and not adapters(model, name):
        raise UserError(f"this model has no adapter called {name!r}")
    before = [(m, m.live) for m in adapted(model).values()]
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
    """{state_dict name: Parameter} of the adapter called `name`, or of all; what is shared is there once."""
    mark = ".adapters." if name is None else f".adapters.{name}."
    return {n: p for n, p in model.named_parameters() if mark in n}


def param_groups(model, lr, lora_plus=1.0, weight_decay=0.0, name=None):
    """Optimiser groups of the trainable adapter parameters. LoRA+: B learns `lora_plus` times faster than A.
    Only A and B decay: a multiplier (l, m, E) pulled to 0 is damage, not regularisation."""
    rest = ("lora_E", "lora_magnitude_vector", "ia3_l")
    groups = (("lora_A", lr, weight_decay), ("lora_B", lr * lora_plus, weight_decay), (rest, lr, 0.0))
    named = [(n, p) for n, p in adapter_parameters(model, name).items() if p.requires_grad]
    out = [dict(params=[p for n, p in named if n.endswith(leaf)], lr=rate, weight_decay=decay)
           for leaf, rate, decay in groups]
    return [g for g in out if g["params"]]


@torch.no_grad()
def merge(model):
    """A plain copy of the model, in fp32, with its live adapter folded into the weights.

    fp32: in bf16 a delta of 1e-3 |W| leaves three entries in four unchanged. A copy: subtracting is not the
    inverse of adding. Codes are dequantised: that is the weight the adapter was trained against. An adapted
    head that was tied gets a weight of its own, or the embedding would change with it.
    """
    if not any(m.live in m.adapters for m in adapted(model).values()):
        raise UserError("merge: no adapter is live in this model, so there is nothing to merge")
    model = copy.deepcopy(model)
    wide = torch.promote_types(model.wte.weight.dtype, torch.float32)
    for path, m in adapted(model.to(wide)).items():
        if m.quant is not None:
            m.weight = nn.Parameter(m.quant(wide))
        if m.live in m.adapters:
            W, b = m.adapters[m.live].merged(m.weight, m.bias)
            m.weight, m.bias = nn.Parameter(W), None if b is None else nn.Parameter(b)
            if path == "head" and model.config.tied:
                model.config = replace(model.config, tied=False)
        del m.quant, m.adapters, m.live
        m.__class__ = nn.Linear                                 # what is left is one
    return model


# ------------------------------------------------------------------------------------- AdaLoRA's rank budget

def budget(t, T, t_i, t_f, b0, bT):
    """Triplets left after step t of T, t from 0: b0, from t_i on a cubic descent, from T - t_f on bT. Eq. 14
    of the paper also subtracts t_f in the numerator and would start above b0: a misprint, see its code."""
    if t >= T - t_f:
        return bT
    return b0 if t <= t_i else int(bT + (b0 - bT) * (1 - (t - t_i) / (T - t_f - t_i)) ** 3)


def svd_groups(model, name="default"):
    """{path: [AdaLoRA, ...]}: modules that share A and E (a fused c_attn from peft) share their triplets."""
    first, groups = {}, {}
    for path, a in adapters(model, name).items():
        groups.setdefault(first.setdefault(id(a.lora_E), path), []).append(a)
    return groups


def orthogonality(model, name="default"):
    """How far AdaLoRA's A and B are from orthonormal: the mean over all of |A A^T - 1| and |B^T B - 1|, not
    squared, as in its authors' code (eq. 4 squares and sums). Never part of the loss that is reported."""
    far = []
    for group in svd_groups(model, name).values():
        A, B = group[0].lora_A, torch.cat([a.lora_B for a in group])            # (r, in), (out, r)
        far += [torch.linalg.norm(gram - torch.eye(len(A)).to(A)) for gram in (A @ A.T, B.T @ B)]
    return sum(far) / len(far)


class RankAllocator:
    """AdaLoRA decides which triplets live: E_i, row i of A and column i of B (sections 3.2 and 3.3).

        I = |w dL/dw|     Ib = b1 Ib + (1 - b1) I     Ub = b2 Ub + (1 - b2) |I - Ib|     s(w) = Ib Ub
        S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)

    Every `every` steps the budget(t) best triplets of the whole model keep their E, the others get E = 0.
    These may grow back until step T - t_f, which prunes for good. Call `update(t)` between optimizer.step()
    and zero_grad(): new weights, old gradients, as its authors do. T and t count optimiser steps.
    """

    def __init__(self, model, total, target_rank=4, t_i=None, t_f=None, every=1, beta1=0.85, beta2=0.85,
                 name="default"):
        self.T, self.every, self.betas = total, every, (beta1, beta2)
        self.t_i = total // 5 if t_i is None else t_i           # by default half of the run prunes
        self.t_f = max(1, 3 * total // 10) if t_f is None else t_f
        self.groups, self.params = svd_groups(model, name), adapter_parameters(model, name)
        self.ranks = [len(group[0].lora_E) for group in self.groups.values()]
        self.b0, self.bT = sum(self.ranks), target_rank * len(self.ranks)
        if not (0 <= self.t_i < total - self.t_f < total and 0 <= self.bT <= self.b0 and every >= 1):
            raise UserError(
                f"AdaLoRA cannot prune from step {self.t_i} to {total - self.t_f} of {total}, every {every}, "
                f"from {self.b0} to {self.bT} triplets: steps must rise and leave one over, triplets fall")
        self.left = self.b0
        self.I, self.U = ({n: torch.zeros_like(p) for n, p in self.params.items()} for _ in "IU")

    @torch.no_grad()
    def update(self, t):
        end, (b1, b2) = self.T - self.t_f, self.betas
        # From `end` on the scores stand still, so the same triplets win: what momentum revives goes again.
        for n, p in self.params.items() if t < end else ():
            if p.grad is None:
                raise UserError(f"AdaLoRA: {n} has no gradient; update between optimizer.step and zero_grad")
            I = (p * p.grad).abs()
            self.I[n].lerp_(I, 1 - b1)
            self.U[n].lerp_((I - self.I[n]).abs(), 1 - b2)
        self.left = budget(t, self.T, self.t_i, self.t_f, self.b0, self.bT)
        if t >= end or t > self.t_i and t % self.every == 0:
            best = torch.cat(self.scores()).topk(self.left).indices             # exactly so many, ties or not
            keep = torch.zeros(self.b0, dtype=torch.bool, device=best.device).index_fill_(0, best, True)
            for group, mask in zip(self.groups.values(), keep.split(self.ranks)):
                group[0].lora_E.mul_(mask[:, None])

    def scores(self):                                                           # a (r,) for each group
        s = {id(p): self.I[n] * self.U[n] for n, p in self.params.items()}
        return [s[id(first.lora_E)][:, 0] + s[id(first.lora_A)].mean(1)
                + torch.cat([s[id(a.lora_B)] for a in (first, *others)]).mean(0)
                for first, *others in self.groups.values()]

    def report(self):
        """The budget, and how many triplets of each module live."""
        alive = {path: int((group[0].lora_E != 0).sum()) for path, group in self.groups.items()}
        return dict(budget=self.left, ranks=alive)

    def state_dict(self):
        return dict(I=self.I, U=self.U)

    def load_state_dict(self, state):
        for n in self.params:
            self.I[n].copy_(state["I"][n])
            self.U[n].copy_(state["U"][n])


# ---------------------------------------------------------------------------- quantised base, adapter folders

def quantise(model, kind, double=False):
    """Store the weight of every Linear in the blocks as codes ("int8" | "nf4"), for good; the head, often the
    embedding too, stays. Returns bits per weight, all counted."""
    if kind not in ("int8", "nf4"):
        raise UserError(f"a base cannot be quantised to {kind!r}; int8 and nf4 are known")
    count = bits = 0
    for path in linears(model):
        if path.startswith("blocks."):
            linear = adopt(model, path)
            linear.quant, linear.weight = Quantised(linear.weight, kind, double), None
            count, bits = count + linear.quant.shape.numel(), bits + linear.quant.bits()
    return bits / count


@torch.no_grad()
def save_adapter(model, folder, base="", name="default", fold=False, extra=None):
    """Write the adapter called `name` as a peft folder.

    base   the model it belongs to, a folder or a hub name, for whoever loads it
    fold   AdaLoRA as a plain LoRA with a rank per module, which is what servers load
    extra  {name: tensor} to keep in the same file, such as {"score.weight": ...} of a reward model
    AdaLoRA triplets with E = 0 are left out (unless all are: an untrained adapter stays whole).
    """
    found, idle = adapters(model, name), {}
    if not found:
        raise UserError(f"this model has no adapter called {name!r} to save")
    like = next(iter(found.values()))
    for paths in fused(model).values():         # of a fused module all parts are written, with rank 0 or ones
        for path in set(paths) - set(found) if set(paths) & set(found) else ():
            m = model.get_submodule(path)       # a quantised one is a LoRALinear already
            m = m if isinstance(m, LoRALinear) else LoRALinear(m)
            idle[path] = make(like.kind, m, False, 0, getattr(like, "scale", None), 0.0, None, False)
    write_adapter(model, folder, found, idle, base, fold, extra)


def load_adapter(model, folder, name="default", trainable=True, force=False):
    """Read a peft folder (LoRA, DoRA, AdaLoRA, IA3) as the adapter `name`, freeze the rest, and make it live.

    Strict: a missing, foreign or misshaped tensor is an error, and so is a base other than the one that the
    adapter was trained on, unless `force`. Returns what `save_adapter` took as `extra`.
    """
    kind, found, extra = read_adapter(model, folder, force)
    made, owner, throwaway = {}, {}, torch.Generator()          # the start it draws is overwritten at once
    for path, (tensors, how) in found.items():
        rank = len(next(iter(tensors.values())))
        made[path] = a = make(kind, adopt(model, path), rank=rank, generator=throwaway, **how)
        for field, t in tensors.items():
            twin = owner.setdefault((field, id(t)), a)
            if twin is a:
                getattr(a, field).data.copy_(t)
            else:                               # one A for q, k and v, and one gradient, as in peft
                setattr(a, field, getattr(twin, field))
    attach(model, made, name, trainable)
    return extra
