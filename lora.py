"""lora.py: change a frozen Linear by a few trainable numbers.

    y = x W^T + b            W (out, in) and b are frozen;       D = dropout(x)
    lora     y + s D A^T B^T                  A (r, in) random   B (out, r) = 0   s = alpha / r            [1]
    rslora   the same, s = alpha / sqrt(r): the scale does not shrink with the rank                        [2]
    lora+    the same, the rate of B is `loraplus_lr_ratio` times that of A                                [3]
    pissa    y + s D A^T B^T - s x A0^T B0^T  A, B start at A0, B0: s B0 A0 is the top r of W's SVD        [4]
    dora     y + (g - 1) x W^T + g s D A^T B^T           g = m / |W + s B A|    m (out) = |W|              [5]
             |.| norms of rows, a constant in backward; b is not rescaled
    adalora  y + s (D A^T * E) B^T            E (r) = 0   s = alpha / (r + 1e-5), r the initial rank       [6]
             loss + orth * orthogonality(model); RankAllocator decides which E are not 0
    ia3      y * l, but for `down` (x * l) W^T + b       l = 1                                             [7]
    quantize W ~ codes times the largest |w| of a block: int8, nf4; data/checkpoints/quantization.py       [8]

[1] Hu et al. 2021 (arXiv 2106.09685) section 4.1   [2] Kalajdzievski 2023 (2312.03732)   [3] Hayou et al.
2024 (2402.12354)   [4] Meng et al. 2024 (2404.02948)   [5] Liu et al. 2024 (2402.09353) eq. 5, section 4.3
[6] Zhang et al. 2023 (2303.10512)   [7] Liu et al. 2022 (2205.05638)   [8] Dettmers et al. 2023 (2305.14314)

Every variant starts at the base model, exactly, and disabled it is the base model, exactly.

A variant is one class: an nn.Module for one Linear, with the attributes of LoRA below as its record. A class
that is added to the `variants` of a method at the end of this file has its flag, training, saving, loading,
merging and a place in the tables without another edit.

Deviations: q, k and v each own an A. A fused GPT-2 `c_attn` adapter of peft is read as three branches sharing
one A (the same model, the same gradients); ours is written as diagonal blocks of c_attn, its rank their sum.
PiSSA leaves W alone and subtracts its start instead; its file holds the exact change, a LoRA of rank 2r.
DoRA's middle term uses x without dropout (peft applies dropout there, which needs a second dense product).
Adapters are fp32 whatever the base is. Cast and quantize the base before adapters are made: they read W.

r rank   in, out widths of the Linear
Public: inject, disable_adapter, use_adapter, merge, save_adapter, load_adapter, adapter_parameters,
param_groups, quantize, base_fingerprint, RankAllocator, orthogonality, budget, VARIANTS, METHODS
"""
import copy
import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass, replace
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoints.peft import (base_fingerprint, fused, peft_type_of, read_adapter,        # noqa: F401
                                   require_known_extra, variant_of, write_adapter)
from data.checkpoints.quantization import (QUANT_SOURCES, QUANT_TYPES, QuantizedWeight, QuantProduct,
                                           compute_dtype, keep_wide)
from data.runtime.files import DataError, UserError
from data.runtime.flags import flag, parse_layers, parse_rank_pattern


class LoRALinear:
    """Mixed into the class of a Linear that `wrap_linear` has wrapped, whose own forward stays the base.

    It keeps the weight and its name, and carries adapters by name, of which one is active (`active`, None:
    none is). Its weight may be codes instead: `quant`.
    """

    def base_forward(self, x):                                  # (..., in) -> (..., out)
        if self.quant is None:
            return super().forward(x)
        return QuantProduct.apply(x, self.quant, self.bias)

    def forward(self, x):
        if self.active in self.adapters:
            return self.adapters[self.active](x, self)
        return self.base_forward(x)


class Adapters(nn.ModuleDict):
    _apply = keep_wide                                          # model.bfloat16() does not reach them


@functools.cache
def lora_class(cls):
    """The class of a wrapped module: LoRALinear in front of its own."""
    return type("LoRA" + cls.__name__, (LoRALinear, cls), {"wrapped_class": cls})


def wrap_linear(module):
    """Make an nn.Linear able to carry adapters, in place; a wrapped one stays as it is.

    Returns the module.
    """
    if not isinstance(module, LoRALinear):
        module.__class__ = lora_class(type(module))
        module.quant = None
        module.adapters = Adapters()
        module.active = None
    return module


def dequantized_weight(linear, dtype):                          # (out, in)
    quant = getattr(linear, "quant", None)
    return linear.weight.to(dtype) if quant is None else quant(dtype)


def new_parameter(linear, tensor):
    """A parameter beside this Linear: on its device, and at least fp32 whatever the Linear is stored in."""
    quant = getattr(linear, "quant", None)
    like = linear.weight if quant is None else quant.codes
    return nn.Parameter(tensor.to(like.device, torch.promote_types(like.dtype, torch.float32)))


# ---------------------------------------------------------------------------------------------- the variants

class Group(NamedTuple):
    """One optimiser group of a variant: which parameter, whether it decays, the flag that multiplies its
    rate."""
    parameter: str
    decay: bool
    rate_flag: str = None


class LoRA(nn.Module):
    """The plain low-rank change. Its class attributes are the record that every variant has or inherits."""
    name = "lora"
    help = "a plain low-rank change"
    groups = (Group("lora_A", decay=True), Group("lora_B", decay=True, rate_flag="loraplus_lr_ratio"))
    unused = ()                                                 # flags of its method that it does not read
    options = None                                              # a group of flags that only it reads
    peft_type = "LORA"                                          # None: a file of its own, see save_adapter
    peft_fields = ("lora_A", "lora_B")                          # its tensors in peft's file
    peft_config = {"use_dora": False}                           # what tells it from others of this peft_type

    def __init__(self, linear, rank, scale, dropout=0.0, generator=None):
        super().__init__()
        bound = 1 / math.sqrt(linear.in_features)               # kaiming_uniform(a=sqrt 5), as everyone does
        a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = new_parameter(linear, a)                                          # (r, in)
        self.lora_B = new_parameter(linear, torch.zeros(linear.out_features, rank))     # (out, r)
        self.scale = scale
        self.drop = nn.Dropout(dropout)
        self.rslora = False                                     # for the file; `scale` is what counts

    @classmethod
    def build(cls, linear, path, rank, scale, dropout, generator, **options):
        """A new adapter for the Linear at `path`."""
        return cls(linear, rank, scale, dropout, generator, **options)

    @staticmethod
    def scale_of(alpha, rank, rslora):
        return alpha / (math.sqrt(rank) if rslora else rank)

    def branch(self, x, A, B):                                  # (..., in) -> (..., r) -> (..., out)
        # B is transposed in memory, a small copy: backward's two products over it run four times as fast
        # (CPU)
        return F.linear(x.to(compute_dtype(x, A.dtype)), A) * self.scale @ B.T.contiguous()

    def forward(self, x, linear):
        y = linear.base_forward(x)
        return y + self.branch(self.drop(x), *self.factors()).to(y.dtype)

    def factors(self):
        """(A, B) of the plain LoRA that this adapter amounts to.

        A variant whose change is not B A overrides forward and merged instead, and sets peft_type = None, because
        the file of "LORA" holds these two alone. peft_tensors, from_peft and identity are then not used.
        """
        return self.lora_A, self.lora_B

    def merged(self, W, b):
        """(weight, bias) of the Linear that this adapter and its base amount to."""
        A, B = self.factors()
        return W + self.scale * (B @ A), b

    def peft_tensors(self, scale, fold, keep_all):
        """{field of peft's file: tensor} at the scale that the file gives to this module."""
        A, B = self.factors()
        return {"lora_A": A, "lora_B": B * (self.scale / scale)}

    @classmethod
    def from_peft(cls, linear, tensors, settings):
        """An adapter for what peft's file holds of one module, whose tensors the caller copies in."""
        rank = len(tensors["lora_A"])
        adapter = cls(linear, rank, settings["scale"], settings["dropout"], torch.Generator())
        adapter.rslora = settings["rslora"]
        return adapter

    @classmethod
    def identity(cls, linear, like):
        """An adapter without effect: the part of a fused module that carries none, in peft's file."""
        return cls(linear, 0, like.scale)


class PiSSA(LoRA):
    """The principal singular directions of W learn, the rest is frozen."""
    name = "pissa"
    help = "start from the principal part of each weight"

    def __init__(self, linear, rank, scale, dropout=0.0, generator=None):
        super().__init__(linear, rank, scale, dropout, generator)
        W = dequantized_weight(linear, torch.float32).detach()
        # in fp64, because fp32 errs by 1e-5 on some CPUs; mps has none
        W = W.to("cpu" if W.device.type == "mps" else W.device, torch.float64)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        root = (S[:rank] / scale).sqrt()  # shared evenly, so that A and B learn at one rate
        self.lora_A.data.copy_(root[:, None] * Vh[:rank])
        self.lora_B.data.copy_(U[:, :rank] * root)
        self.register_buffer("lora_A0", self.lora_A.detach().clone())
        self.register_buffer("lora_B0", self.lora_B.detach().clone())

    def forward(self, x, linear):
        y = linear.base_forward(x)
        learned = self.branch(self.drop(x), self.lora_A, self.lora_B)
        return y + (learned - self.branch(x, self.lora_A0, self.lora_B0)).to(y.dtype)

    def factors(self):
        return torch.cat((self.lora_A, self.lora_A0)), torch.cat((self.lora_B, -self.lora_B0), 1)


@torch.no_grad()
def row_norm(W, A, B, s):
    """|W + s B A| by rows, without that matrix: |w|^2 + 2 s <w A^T, b> + s^2 <b A A^T, b>. Returns (out,)."""
    with torch.autocast(W.device.type, enabled=False):          # in bf16 every row would be a little off
        W = W.to(A.dtype)
        squares = torch.linalg.vector_norm(W, dim=1).square()
        cross = (W @ A.T * B).sum(1)
        return (squares + 2 * s * cross + s * s * (B @ (A @ A.T) * B).sum(1)).clamp_min(1e-30).sqrt()


class DoRA(LoRA):
    """Weight decomposed into a magnitude m, trained, and a direction, changed by a LoRA."""
    name = "dora"
    help = "learn magnitude and direction apart"
    groups = (*LoRA.groups, Group("lora_magnitude_vector", decay=False))    # m pulled to 0 is damage
    peft_fields = (*LoRA.peft_fields, "lora_magnitude_vector")
    peft_config = {"use_dora": True}

    def __init__(self, linear, rank, scale, dropout=0.0, generator=None):
        super().__init__(linear, rank, scale, dropout, generator)
        W = dequantized_weight(linear, self.lora_A.dtype)
        self.lora_magnitude_vector = nn.Parameter(row_norm(W, self.lora_A, self.lora_B, scale))     # (out,)

    def gain(self, W):                                          # (out,); exactly 1 at the start
        return self.lora_magnitude_vector / row_norm(W, self.lora_A, self.lora_B, self.scale)

    def forward(self, x, linear):
        y = linear.base_forward(x)
        g = self.gain(dequantized_weight(linear, self.lora_A.dtype))
        product = y if linear.bias is None else y - linear.bias
        delta = (g - 1) * product + g * self.branch(self.drop(x), self.lora_A, self.lora_B)
        return y + delta.to(y.dtype)

    def merged(self, W, b):
        return self.gain(W)[:, None] * super().merged(W, b)[0], b

    def peft_tensors(self, scale, fold, keep_all):
        tensors = super().peft_tensors(scale, fold, keep_all)
        return {**tensors, "lora_magnitude_vector": self.lora_magnitude_vector}


class AdaLoRA(LoRA):
    """B E A is an SVD in the making: B and A are kept near orthonormal, E holds the singular values."""
    name = "adalora"
    help = "a low-rank change whose rank is shared out among the modules"
    groups = (Group("lora_A", decay=True), Group("lora_B", decay=True), Group("lora_E", decay=False))
    unused = ("rslora",)
    peft_type = "ADALORA"
    peft_fields = (*LoRA.peft_fields, "lora_E")
    peft_config = {}

    def __init__(self, linear, rank, scale, dropout=0.0, generator=None):
        super().__init__(linear, rank, scale, dropout, generator)
        for p in (self.lora_A, self.lora_B):
            p.data.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator))
        self.lora_E = new_parameter(linear, torch.zeros(rank, 1))

    @staticmethod
    def scale_of(alpha, rank, rslora):
        return alpha / (rank + 1e-5)

    def factors(self):
        return self.lora_A * self.lora_E, self.lora_B

    def peft_tensors(self, scale, fold, keep_all):
        """Triplets with E = 0 drop out, unless keep_all. fold: E goes into A, which makes a plain LoRA."""
        kept = (self.lora_E[:, 0] != 0) | keep_all                      # (r,) bool
        A = self.factors()[0] if fold else self.lora_A
        tensors = {"lora_A": A[kept], "lora_B": (self.lora_B * (self.scale / scale))[:, kept]}
        return tensors if fold else {**tensors, "lora_E": self.lora_E[kept], "kept": kept}


class IA3(nn.Module):
    """Rescale what goes into `down` and what comes out of every other Linear."""
    name = "ia3"
    help = "rescaling vectors"
    groups = (Group("ia3_l", decay=False),)                     # a factor pulled to 0 is damage
    unused = ("rank", "alpha", "dropout", "rslora", "rank_pattern")
    options = None
    peft_type = "IA3"
    peft_fields = ("ia3_l",)
    peft_config = {}

    def __init__(self, linear, inputs):
        super().__init__()
        self.inputs = inputs                                    # rescale the input, else the output
        self.ia3_l = new_parameter(linear, torch.ones(linear.in_features if inputs else linear.out_features))

    @classmethod
    def build(cls, linear, path, rank, scale, dropout, generator):
        return cls(linear, inputs=path.endswith(".down"))

    @staticmethod
    def scale_of(alpha, rank, rslora):
        return None

    def forward(self, x, linear):
        if self.inputs:
            return linear.base_forward((x * self.ia3_l).to(x.dtype))
        y = linear.base_forward(x)
        return (y * self.ia3_l).to(y.dtype)

    def merged(self, W, b):
        if self.inputs:
            return W * self.ia3_l, b
        return W * self.ia3_l[:, None], None if b is None else b * self.ia3_l

    def peft_tensors(self, scale, fold, keep_all):
        return {"ia3_l": self.ia3_l}

    @classmethod
    def from_peft(cls, linear, tensors, settings):
        return cls(linear, settings["inputs"])

    @classmethod
    def identity(cls, linear, like):
        return cls(linear, inputs=False)


# ------------------------------------------------------------------------------------- inject, choose, merge

def linears(model):
    """{path: Linear}; the last word of a path (q k v o up gate down head) is what users name in targets."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def wrapped_linears(model):
    return {path: m for path, m in linears(model).items() if isinstance(m, LoRALinear)}


def adapters(model, name="default"):
    """{path: adapter} of the adapter called `name`."""
    return {path: m.adapters[name] for path, m in wrapped_linears(model).items() if name in m.adapters}


def first_adapted_block(model, names):
    """The lowest block with an adapter of these names: what enters it is the same with and without them. 0 if
    there is no adapter, the last block if only the head has one."""
    last = len(model.blocks) - 1
    paths = [path for name in names for path in adapters(model, name)]
    blocks = [int(path.split(".")[1]) for path in paths if path.startswith("blocks.")]
    return min(blocks, default=last) if paths else 0


def add_adapter(model, made, name, trainable=True):
    """Add {path: adapter} as `name`, activate it, and freeze all that is no adapter.

    Backward then stops at the lowest adapter, because nothing below it needs a gradient. Raises UserError for
    a name that is taken or cannot name a module.
    """
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise UserError(f"{name!r} cannot name an adapter; use a word like policy, value or default")
    if adapters(model, name):
        raise UserError(f"this model already has an adapter called {name!r}; choose another name")
    for path, adapter in made.items():
        model.get_submodule(path).adapters[name] = adapter.train(model.training)
        for p in adapter.parameters():                  # a variant may own frozen parameters
            p.requires_grad_(trainable and p.requires_grad)
    for parameter_name, p in model.named_parameters():
        if ".adapters." not in parameter_name:
            p.requires_grad_(False)
    for m in wrapped_linears(model).values():
        m.active = name


def variant_called(name):
    """The class of a variant. Raises UserError that lists the known ones."""
    for variant in VARIANTS:
        if variant.name == name:
            return variant
    raise UserError(f"LoRA variant {name!r} is unknown; known are {', '.join(v.name for v in VARIANTS)}")


def select_linears(model, targets, layers, rank_pattern):
    """The paths that `targets` (words) in `layers` (block numbers, None: all) mean. Raises UserError."""
    paths = list(linears(model))
    words = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    unknown = [t for t in targets if t not in words]
    unknown += [t for t in rank_pattern if t not in words and t not in paths]
    if unknown:
        raise UserError(f"{unknown[0]!r} matches nothing in this model; it has {' '.join(words)}, and "
                        "several are separated by commas")
    depth = len(model.blocks)
    for i in layers or ():
        if i not in range(depth):
            raise UserError(f"there is no block {i} in this model; layers go from 0 to {depth - 1}")
    inside = tuple(f"blocks.{i}." for i in (range(depth) if layers is None else layers))
    chosen = [path for path in paths if path.rpartition(".")[2] in targets
              and (path.startswith(inside) or not path.startswith("blocks."))]
    if not chosen:
        raise UserError(f"targets {','.join(targets)!r} in layers {list(layers or ())} are no modules at all")
    for t in rank_pattern:
        if not any(path == t or path.endswith("." + t) for path in chosen):
            raise UserError(f"rank_pattern gives {t!r} a rank, but targets {','.join(targets)} leave it out")
    return chosen


# More than eight parameters, because each is a flag of the command: this is the library's one entry.
def inject(model, targets=("q", "v"), variant="lora", rank=8, alpha=16, dropout=0.0, rslora=False,
           layers=None, rank_pattern=None, name="default", seed=0, **options):
    """Put a new adapter on every Linear whose last word is in `targets`, freeze the rest, and activate it.

    targets       words such as ("q", "v") or "q,v"        layers   block numbers, None: all
    variant       a name in VARIANTS; `options` are the flags that only that variant has
    rank_pattern  {word or full path: rank} where it is not `rank`
    seed          of the adapter's own generator: adding an adapter shifts no other random number
    Returns the adapted paths, such as "blocks.0.attn.q". Raises UserError for what cannot be.
    """
    cls = variant_called(variant)
    targets = targets.split(",") if isinstance(targets, str) else targets
    rank_pattern = rank_pattern or {}
    check_inject(cls, targets, rank, rank_pattern, alpha, dropout, layers, seed, options)
    if not (alpha > 0 and 0 <= dropout < 1):
        raise UserError(f"alpha must be positive and dropout in [0, 1); they are {alpha} and {dropout}")
    given = {"dropout": dropout, "rank_pattern": rank_pattern, "rslora": rslora}
    for word in cls.unused:
        if given.get(word):
            raise UserError(f"{variant} has no use for {word}; leave it out")
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path in select_linears(model, targets, layers, rank_pattern):
        module = model.get_submodule(path)
        r = rank_pattern.get(path, rank_pattern.get(path.rpartition(".")[2], rank))
        most = min(module.in_features, module.out_features)
        if "rank" not in cls.unused and not 1 <= r <= most:
            raise UserError(f"rank {r} does not fit {path}; it takes 1 to {most}")
        scale = cls.scale_of(alpha, r, rslora)
        made[path] = cls.build(wrap_linear(module), path, r, scale, dropout, generator, **options)
        made[path].rslora = rslora
        made[path].settings = dict(rank=r, scale=scale, dropout=dropout, **options)
    path = next(iter(made))
    check_saved_form(model.get_submodule(path), made[path])
    add_adapter(model, made, name)
    return list(made)


@torch.no_grad()
def check_saved_form(linear, adapter):
    """UserError where peft's file would hold another adapter than this one: a variant with a forward of its own to
    which its factors do not amount. Tried with random numbers in place of the trained ones."""
    cls = type(adapter)
    device = next(adapter.parameters()).device
    if cls.peft_type is None or device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    trained = copy.deepcopy(adapter).eval()
    for p in trained.parameters():
        p.copy_(torch.randn(p.shape, generator=generator))
    scale = adapter.settings["scale"]
    tensors = trained.peft_tensors(scale, fold=False, keep_all=True)
    reader = variant_of({"peft_type": cls.peft_type, **cls.peft_config}, VARIANTS, cls.__name__)
    loaded = reader.from_peft(linear, tensors, dict(scale=scale, dropout=0.0, rslora=adapter.rslora,
                                                    inputs=getattr(adapter, "inputs", None))).eval()
    for leaf in reader.peft_fields:
        getattr(loaded, leaf).copy_(tensors[leaf])
    like = linear.bias if linear.weight is None else linear.weight          # codes compute beside a bias
    dtype = torch.float32 if like is None else like.dtype
    x = torch.randn(4, linear.in_features, generator=generator).to(device, dtype)
    y = trained(x, linear)
    if (y - loaded(x, linear)).norm() > 0.05 * (y - linear.base_forward(x)).norm():        # rounding is far less
        raise UserError(f"{cls.__name__}: peft's file of it would lose a part, because it keeps "
                        f"{' and '.join(cls.peft_fields)} alone; let factors() be what its forward amounts to, or set "
                        "peft_type = None and override merged")


def check_inject(cls, targets, rank, rank_pattern, alpha, dropout, layers, seed, options):
    """UserError for an argument of `inject` of a wrong type, or an option that the variant does not have."""
    known = [f.name for f in fields(cls.options)] if cls.options else []
    for word in options:
        if word not in known:
            raise UserError(f"inject has no {word}, nor has the variant {cls.name}; it has "
                            f"{' '.join(known) or 'none'}")
    if not isinstance(targets, (list, tuple)) or not isinstance(rank_pattern, dict):
        raise UserError(f"inject: targets are {targets!r} and rank_pattern {rank_pattern!r}; they must be "
                        "words, as in \"q,v\" or (\"q\", \"v\"), and a dict, as in {\"q\": 4}")
    whole = [rank, *rank_pattern.values(), seed, *(layers if hasattr(layers, "__iter__") else ())]
    wrong = [value for value in whole if not isinstance(value, Integral)]
    wrong += [value for value in (alpha, dropout) if not isinstance(value, (int, float))]
    wrong += [word for word in targets if not isinstance(word, str)]
    if layers is not None and not hasattr(layers, "__iter__"):
        wrong.append(layers)
    if wrong:
        raise UserError(f"inject: {wrong[0]!r} has the wrong type; targets are words, ranks, layers (a list) "
                        "and seed whole numbers, alpha and dropout numbers")


@contextmanager
def use_adapter(model, name):
    """Inside, the adapter called `name` is active (None: none is). Raises UserError for an unknown name.

    With activation checkpointing, run backward inside too: it computes the forward again, and must find the
    same adapter.
    """
    wrapped = wrapped_linears(model).values()
    if name is not None and not any(name in m.adapters for m in wrapped):
        raise UserError(f"this model has no adapter called {name!r}")
    before = [(m, m.active) for m in wrapped]
    try:
        for m, _ in before:
            m.active = name
        yield
    finally:
        for m, active in before:
            m.active = active


def disable_adapter(model):
    """Inside, the model is its frozen base: PPO's reference policy without a copy."""
    return use_adapter(model, None)


def adapter_parameters(model, name=None):
    """{state_dict name: Parameter} of the adapter called `name`, or of all; what is shared is there once."""
    mark = ".adapters." if name is None else f".adapters.{name}."
    return {n: p for n, p in model.named_parameters() if mark in n}


def param_groups(model, lr, loraplus_lr_ratio=1.0, weight_decay=0.0, name=None):
    """Optimiser groups of the trainable adapter parameters, as the records of their variants say.

    Raises UserError for a trainable parameter that its variant puts in no group, and if there is none.
    """
    ratios = {None: 1.0, "loraplus_lr_ratio": loraplus_lr_ratio}
    groups = {}
    if not any(p.requires_grad for p in adapter_parameters(model, name).values()):
        raise UserError("this model has no trainable adapter; inject one, or load it with trainable=True")
    for parameter_name, p in adapter_parameters(model, name).items():
        if not p.requires_grad:
            continue
        owner, leaf = parameter_name.rsplit(".", 1)
        variant = type(model.get_submodule(owner))
        group = next((g for g in variant.groups if g.parameter == leaf), None)
        if group is None:
            raise UserError(f"{parameter_name} is trainable, but {variant.__name__}.groups has no Group for "
                            f"{leaf}; add one, or freeze it")
        groups.setdefault(group, []).append(p)
    return [dict(params=params, lr=lr * ratios[g.rate_flag], weight_decay=weight_decay * g.decay)
            for g, params in groups.items()]


@torch.no_grad()
def merge(model):
    """A plain copy of the model, in fp32, with its active adapter folded into the weights.

    fp32: in bf16 a delta of 1e-3 |W| leaves three entries in four unchanged. A copy: subtracting is not the
    inverse of adding. Codes are dequantized: that is the weight the adapter was trained against. An adapted
    head that was tied gets a weight of its own, or the embedding would change with it. Raises UserError if no
    adapter is active.
    """
    if not any(m.active in m.adapters for m in wrapped_linears(model).values()):
        raise UserError("merge: no adapter is active in this model, so there is nothing to merge")
    model = copy.deepcopy(model)
    wide = torch.promote_types(model.wte.weight.dtype, torch.float32)
    for path, m in wrapped_linears(model.to(wide)).items():
        if m.quant is not None:
            m.weight = nn.Parameter(m.quant(wide))
        if m.active in m.adapters:
            W, b = m.adapters[m.active].merged(m.weight, m.bias)
            m.weight = nn.Parameter(W)
            m.bias = None if b is None else nn.Parameter(b)
            if path == "head" and model.config.tied:
                model.config = replace(model.config, tied=False)
        del m.quant, m.adapters, m.active
        m.__class__ = m.wrapped_class
    return model


# ------------------------------------------------------------------------------------- AdaLoRA's rank budget

def budget(t, T, t_i, t_f, b0, bT):
    """Triplets left after step t of T, t from 0: b0, from t_i on a cubic descent, from T - t_f on bT.

    Eq. 14 of the paper also subtracts t_f in the numerator and would start above b0: a misprint, see its
    code.
    """
    if t >= T - t_f:
        return bT
    if t <= t_i:
        return b0
    return int(bT + (b0 - bT) * (1 - (t - t_i) / (T - t_f - t_i)) ** 3)


def svd_groups(model, name="default"):
    """{path: [AdaLoRA, ...]}: modules that share A and E (a fused c_attn from peft) share their triplets.

    Raises UserError without an AdaLoRA adapter of this name.
    """
    first_path = {}
    groups = {}
    for path, adapter in adapters(model, name).items():
        if not hasattr(adapter, "lora_E"):
            raise UserError(f"the adapter {name!r} is a {type(adapter).name}, and this is for adalora")
        owner = first_path.setdefault(id(adapter.lora_E), path)
        groups.setdefault(owner, []).append(adapter)
    if not groups:
        raise UserError(f"this model has no adapter called {name!r}")
    return groups


def orthogonality(model, name="default"):
    """How far AdaLoRA's A and B are from orthonormal: the mean over all of |A A^T - 1| and |B^T B - 1|.

    Norms, not their squares, as in its authors' code (eq. 4 squares and sums). Never part of the reported
    loss.
    """
    distances = []
    for group in svd_groups(model, name).values():
        A = group[0].lora_A                                                     # (r, in)
        B = torch.cat([adapter.lora_B for adapter in group])                    # (out, r)
        identity = torch.eye(len(A)).to(A)
        distances.append(torch.linalg.norm(A @ A.T - identity))
        distances.append(torch.linalg.norm(B.T @ B - identity))
    return sum(distances) / len(distances)


class RankAllocator:
    """AdaLoRA decides which triplets are not 0: E_i, row i of A and column i of B (sections 3.2 and 3.3).

        I = |w dL/dw|     Ib = b1 Ib + (1 - b1) I     Ub = b2 Ub + (1 - b2) |I - Ib|     s(w) = Ib Ub
        S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)

    Every `every` steps the budget(t) best triplets of the whole model keep their E, the others get E = 0.
    These may grow back until step T - t_f, which prunes for good. Call `update(t)` between optimizer.step()
    and zero_grad(): new weights, old gradients, as its authors do. T and t count optimiser steps. `penalty`
    is what a step adds to its loss. Raises UserError for a schedule that cannot be.
    """

    def __init__(self, model, total, target_rank=4, t_i=None, t_f=None, every=1, orth=0.0, name="default"):
        self.T = total
        self.every = every
        self.orth = orth
        self.model = model
        self.name = name
        self.t_i = total // 5 if t_i is None else t_i           # by default half of the run prunes
        self.t_f = max(1, 3 * total // 10) if t_f is None else t_f
        self.groups = svd_groups(model, name)
        self.params = adapter_parameters(model, name)
        self.ranks = [len(group[0].lora_E) for group in self.groups.values()]
        self.b0 = sum(self.ranks)
        self.bT = target_rank * len(self.ranks)
        if not (0 <= self.t_i < total - self.t_f < total and 0 <= self.bT <= self.b0 and every >= 1):
            raise UserError(
                f"AdaLoRA cannot prune from step {self.t_i} to {total - self.t_f} of {total}, every {every}, "
                f"from {self.b0} to {self.bT} triplets: steps must rise and leave one over, triplets fall")
        self.left = self.b0
        self.I = {n: torch.zeros_like(p) for n, p in self.params.items()}
        self.U = {n: torch.zeros_like(p) for n, p in self.params.items()}

    def penalty(self):
        """The orthogonality term of a step's loss, a scalar."""
        return self.orth * orthogonality(self.model, self.name)

    @torch.no_grad()
    def update(self, t, beta1=0.85, beta2=0.85):
        """After optimiser step t: update the scores, and prune when it is due. Raises UserError."""
        end = self.T - self.t_f
        if t < end:  # from `end` on the scores stay, so the same triplets win: what momentum revives is cut
            for n, p in self.params.items():
                if p.grad is None:
                    raise UserError(f"AdaLoRA: {n} has no gradient; update between optimizer.step and "
                                    "zero_grad")
                I = (p * p.grad).abs()
                self.I[n].lerp_(I, 1 - beta1)
                self.U[n].lerp_((I - self.I[n]).abs(), 1 - beta2)
        self.left = budget(t, self.T, self.t_i, self.t_f, self.b0, self.bT)
        if t >= end or t > self.t_i and t % self.every == 0:
            best = torch.cat(self.scores()).topk(self.left).indices             # exactly so many, ties or not
            keep = torch.zeros(self.b0, dtype=torch.bool, device=best.device).index_fill_(0, best, True)
            for group, mask in zip(self.groups.values(), keep.split(self.ranks)):
                group[0].lora_E.mul_(mask[:, None])

    def scores(self):                                                           # a (r,) for each group
        s = {id(p): self.I[n] * self.U[n] for n, p in self.params.items()}
        scores = []
        for group in self.groups.values():
            first = group[0]
            of_B = torch.cat([s[id(adapter.lora_B)] for adapter in group]).mean(0)
            scores.append(s[id(first.lora_E)][:, 0] + s[id(first.lora_A)].mean(1) + of_B)
        return scores

    def report(self):
        """The budget, and how many triplets of each module are not 0."""
        active = {path: int((group[0].lora_E != 0).sum()) for path, group in self.groups.items()}
        return dict(budget=self.left, ranks=active)

    def is_pruned(self, step):
        """Whether the ranks after so many steps are the final ones."""
        return step > self.T - self.t_f

    def state_dict(self):
        return dict(I=self.I, U=self.U, left=self.left)

    def load_state_dict(self, state):
        self.left = state.get("left", self.left)            # a state of an earlier version lacks it
        for n in self.params:
            self.I[n].copy_(state["I"][n])
            self.U[n].copy_(state["U"][n])


# ---------------------------------------------------------------------------- quantized base, adapter folders

def quantize(model, dtype, double=False, source=None):
    """Store the weight of every Linear in the blocks as codes ("int8" | "nf4"), for good.

    source: a torch dtype to round weights to before; codes of a bf16 weight are not those of its fp32 original.
    The head stays: it is often the embedding, too. Returns bits per weight, everything counted. Raises
    UserError for another dtype, and for a model that is quantized already.
    """
    if dtype not in QUANT_TYPES:
        raise UserError(f"a base cannot be quantized to {dtype!r}; {' and '.join(QUANT_TYPES)} are known")
    count = 0
    bits = 0
    for path, module in linears(model).items():
        if path.startswith("blocks."):
            linear = wrap_linear(module)
            if linear.quant is not None:
                raise UserError("this model is quantized already; load it again for another dtype")
            linear.quant = QuantizedWeight(linear.weight.to(source), dtype, double)
            linear.weight = None
            count += linear.quant.shape.numel()
            bits += linear.quant.bits()
    return bits / count


@torch.no_grad()
def save_adapter(model, folder, base="", name="default", fold=False, extra=None):
    """Write the adapter called `name` as a peft folder.

    base   the model it belongs to, a folder or a hub name, for whoever loads it
    fold   AdaLoRA as a plain LoRA with a rank per module, which is what servers load
    extra  {name: tensor} to keep in the same file, such as {"score.weight": ...} of a reward model
    AdaLoRA triplets with E = 0 are left out (unless all are: an untrained adapter stays whole). A variant
    that peft does not have (peft_type None) is written as its state dict and its settings. Raises UserError.
    """
    found = adapters(model, name)
    if not found:
        raise UserError(f"this model has no adapter called {name!r} to save")
    like = next(iter(found.values()))
    idle = {}
    for paths in fused(model).values():         # of a fused module all parts are written, with rank 0 or ones
        if set(paths) & set(found) and like.peft_type is not None:
            for path in set(paths) - set(found):
                idle[path] = type(like).identity(model.get_submodule(path), like)
    write_adapter(model, folder, found, idle, base, fold, extra)


def load_adapter(model, folder, name="default", trainable=True, force=False):
    """Read an adapter folder as the adapter `name`, freeze the rest, and activate it.

    Strict: a missing, foreign or misshaped tensor is a DataError, and so is a base other than the one that
    the adapter was trained on, unless `force`. Returns what `save_adapter` took as `extra`.
    """
    variant, modules, extra = read_adapter(model, folder, VARIANTS, force)
    made = {}
    owner = {}
    for path, (tensors, settings) in modules.items():
        linear = wrap_linear(model.get_submodule(path))
        if variant.peft_type is None:
            try:
                made[path] = variant.build(linear, path, generator=torch.Generator(), **settings)
            except (TypeError, ValueError, RuntimeError) as e:
                fault = " ".join(str(e).split())
                raise DataError(f"{folder}: {path} cannot be built as {variant.name} ({fault})") from None
            made[path].settings = settings
            load_strictly(made[path], tensors, f"{folder}: {path}")
            continue
        adapter = variant.from_peft(linear, tensors, settings)
        made[path] = adapter
        for leaf, t in tensors.items():
            first = owner.setdefault((leaf, id(t)), adapter)
            if first is adapter:
                getattr(adapter, leaf).data.copy_(t)
            else:                               # one A for q, k and v, and one gradient, as in peft
                setattr(adapter, leaf, getattr(first, leaf))
    add_adapter(model, made, name, trainable)
    return extra


def load_strictly(adapter, tensors, where):
    try:
        adapter.load_state_dict(tensors)
    except RuntimeError as e:
        raise DataError(f"{where}: {' '.join(str(e).split())}") from None


# ---------------------------------------------------------------------------------------- flags and records

@dataclass(frozen=True)
class AdapterFlags:
    """LoRA"""
    targets: str = flag("q,v", "which Linears: q k v o up gate down head")
    layers: str = flag(None, "which layers, as 0-3,5 or upper, upper-third, upper-quarter; default: all", type=str)
    quant: str = flag("none", "store the frozen base in fewer bits", choices=("none", *QUANT_TYPES))
    double_quant: bool = flag(False, "quantize the blocks' scales as well")

    @staticmethod
    def check(cfg):
        parse_layers(cfg.layers, 1)
        if cfg.quant == "none" and cfg.double_quant:
            raise UserError("--double_quant quantizes the scales of --quant int8 or nf4, and there is none")


@dataclass(frozen=True)
class RankFlags:
    """LoRA"""
    rank: int = flag(8, "r, the width of the bottleneck", low=1)
    alpha: float = flag(16.0, "the delta is scaled by alpha / rank", low=0)
    rank_pattern: str = flag(None, "other ranks by word or path, as down=16,blocks.0.attn.q=2", type=str)

    @staticmethod
    def check(cfg):
        parse_rank_pattern(cfg.rank_pattern)


@dataclass(frozen=True)
class RsLoRAFlags:
    """LoRA"""
    rslora: bool = flag(False, "scale by alpha / sqrt(rank)")


@dataclass(frozen=True)
class DropoutFlags:
    """LoRA"""
    dropout: float = flag(0.0, "on the adapter's input", low=0, below=1)


@dataclass(frozen=True)
class DecayFlags:
    """training"""
    weight_decay: float = flag(0.0, "decay of matrices", low=0)


@dataclass(frozen=True)
class LoRAPlusFlags:
    """LoRA"""
    loraplus_lr_ratio: float = flag(1.0, "the rate of B is this many times that of A", low=0)


@dataclass(frozen=True)
class AdaLoRAFlags:
    """LoRA"""
    target_rank: int = flag(4, "mean rank that pruning ends at", low=1)
    orth: float = flag(0.1, "weight of the orthogonality term", low=0)
    prune_start: float = flag(0.2, "share of the steps before pruning", low=0, high=1)
    prune_end: float = flag(0.3, "share of the steps after it", low=0, high=1)
    prune_every: int = flag(10, "steps between prunings", low=1)


def rank_allocator(model, cfg, total):
    """AdaLoRA's allocator for a run of `total` steps."""
    return RankAllocator(model, total, cfg.target_rank, round(cfg.prune_start * total),
                         round(cfg.prune_end * total), cfg.prune_every, cfg.orth)


def switch_flags(variants):
    """A group with a switch for every variant but the first, and the flags that only one variant reads."""
    switches = [(v.name, bool, flag(False, v.help)) for v in variants[1:]]
    groups = tuple(v.options for v in variants if v.options)

    def check(cfg):
        chosen = [v for v in variants[1:] if getattr(cfg, v.name)]
        if len(chosen) > 1:
            raise UserError(f"--{chosen[0].name} and --{chosen[1].name} are two variants; take one of them")
        variant = chosen[0] if chosen else variants[0]
        for word in variant.unused:
            if word in cfg.given:
                raise UserError(f"--{word} means nothing to --{variant.name}; leave it out")
        for other in variants:
            if other is not variant and other.options:
                for f in fields(other.options):
                    if f.name in cfg.given:
                        raise UserError(f"--{f.name} belongs to --{other.name}; add it, or leave both out")

    namespace = {"__doc__": "LoRA", "check": staticmethod(check)}
    return make_dataclass("VariantFlags", switches, namespace=namespace, frozen=True), *groups


@dataclass(frozen=True)
class LoRAMethod:
    """A --method that changes Linears. `variants`: the first is its own, the others are switches of it."""
    name: str
    help: str
    variants: tuple
    flags: tuple                                    # groups of flags that every task reads
    defaults: dict  # of flags, where this method's first run needs another value
    loop_flags: tuple = ()                          # groups that only the supervised loop reads
    rate_falls: bool = False                        # the default rate falls with the model's width
    refuses: dict = field(default_factory=dict)     # {task: why this method does not do it}
    allocator: object = None                        # (model, cfg, total) -> RankAllocator
    selected_by = "method"
    trains = True
    trains_base = False
    mergeable = True
    critic_lr: float = None                         # of PPO's critic, a LoRA, where --lr does not suit one
    cost_kind: str = "lora"                         # how data/results/cost_model.py counts it

    @property
    def peft_types(self):
        return tuple(dict.fromkeys(peft_type_of(v) for v in self.variants))

    def variant(self, cfg):
        """The class that the flags choose."""
        return next((v for v in self.variants[1:] if getattr(cfg, v.name)), self.variants[0])

    def apply(self, ctx, cfg, log):
        """Freeze the model, add adapters. Returns {name: trainable parameter}. Raises UserError."""
        if cfg.quant != "none":
            bits = quantize(ctx.model, cfg.quant, cfg.double_quant)
            log(f"base in {cfg.quant}: {bits:.2f} bits per weight of the blocks")
        variant = self.variant(cfg)
        names = ("rank", "alpha", "dropout", "rslora")
        settings = {name: cfg.get(name) for name in names if name in cfg and name not in variant.unused}
        if "rank_pattern" in cfg:
            settings["rank_pattern"] = parse_rank_pattern(cfg.rank_pattern)
        if variant.options:
            settings.update({f.name: cfg.get(f.name) for f in fields(variant.options)})
        layers = parse_layers(cfg.layers, ctx.model.config.n_layer)
        inject(ctx.model, cfg.targets, variant.name, layers=layers, seed=cfg.seed, **settings)
        return {name: p for name, p in adapter_parameters(ctx.model).items() if p.requires_grad}

    def param_groups(self, ctx, cfg, trainable):
        return param_groups(ctx.model, cfg.lr, cfg.get("loraplus_lr_ratio", 1.0),
                            cfg.get("weight_decay", 0.0))

    def save(self, ctx, folder, base):
        save_adapter(ctx.model, folder, base=base)

    def load(self, model, folder, settings):
        """Read an adapter folder into the model; `settings` are those of its run.json. Returns no prompt."""
        if settings.get("quant", "none") != "none":  # the base it was trained against, rounding and all
            source = settings.get("quant_source", "float32")
            if source not in QUANT_SOURCES:
                raise DataError(f"{folder}/run.json: quant_source is {source!r}; it can be "
                                f"{' or '.join(QUANT_SOURCES)}")
            quantize(model, settings["quant"], settings.get("double_quant", False), QUANT_SOURCES[source])
        require_known_extra(folder, load_adapter(model, folder), model.config.n_embd)

    def run_settings(self, ctx, cfg):
        """What run.json keeps so that `load` can rebuild the model."""
        if cfg.quant == "none":
            return {}
        source = str(ctx.dtype).removeprefix("torch.")      # frozen weights are stored as they compute
        return dict(quant=cfg.quant, double_quant=cfg.double_quant, quant_source=source)

    def cost(self, cfg, n_layer):
        """What data/results/cost_model.py needs to know."""
        targets = tuple(word for word in cfg.targets.split(",") if word != "head")
        keeps_output = "lora_magnitude_vector" in [g.parameter for g in self.variant(cfg).groups]
        return dict(kind=self.cost_kind, targets=targets, rank=cfg.get("rank", 1), keeps_output=keeps_output,
                    quant=cfg.quant, first_layer=min(parse_layers(cfg.layers, n_layer) or [0]))


LORA_VARIANTS = (LoRA, DoRA, PiSSA)                 # add a class here: the switch --NAME appears by itself
METHODS = (
    LoRAMethod("lora", "low-rank deltas", variants=LORA_VARIANTS,
               flags=(AdapterFlags, RankFlags, RsLoRAFlags, *switch_flags(LORA_VARIANTS)),
               loop_flags=(DropoutFlags, DecayFlags, LoRAPlusFlags),
               defaults=dict(lr=5e-3, targets="q,v,up,down"), rate_falls=True),
    LoRAMethod("adalora", "low-rank deltas, rank budget", variants=(AdaLoRA,),
               flags=(AdapterFlags, RankFlags), loop_flags=(DropoutFlags, DecayFlags, AdaLoRAFlags),
               defaults=dict(lr=1e-2, epochs=8.0, targets="q,v,up,down"), allocator=rank_allocator,
               refuses={"ppo": "it prunes by the supervised loop's schedule; take --method lora"}),
    LoRAMethod("ia3", "rescaling vectors", variants=(IA3,), flags=(AdapterFlags,),
               cost_kind="ia3", critic_lr=5e-3,
               defaults=dict(lr=3e-2, targets="k,v,down")),
)
VARIANTS = tuple(variant for method in METHODS for variant in method.variants)
