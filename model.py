"""model.py: one decoder-only transformer: GPT-2, Llama (SmolLM2, Mistral, Qwen), GLM-4, GPT-NeoX (Pythia).

    h_0     = wte[x] (+ wpe[p])                                token embeddings; learned positions in GPT-2
    h       = h + o(softmax(mask + q k^T / sqrt(hs)) v)        q, k, v: heads of ln_1(h); rotary elsewhere
    h       = h + down(gelu(up(z)))                            z = ln_2(h)   (GPT-2, GPT-NeoX)
    h       = h + down(silu(gate(z)) * up(z))                                (Llama, GLM-4)
    logits  = head(ln_f(h))

In GPT-NeoX z is ln_2 of the h that ln_1 reads, too (parallel residual). GLM-4 (glm4, not glm) puts a norm
behind o and down. In both only a part of each head is rotated.

GPT-2: Radford et al. 2019, section 2.3. Llama: Touvron et al. 2023 (arXiv 2302.13971), section 2.2. GPT-NeoX:
Black et al. 2022 (2204.06745), section 2.1. GLM-4: GLM team 2024 (2406.12793), section 2. Rotary positions:
Su et al. 2021 (2104.09864), section 3.2. Grouped-query attention: Ainslie et al. 2023 (2305.13245). A family
is a record in data/checkpoints/hf.py; here it is a handful of GPTConfig fields.

`past`: a list with one entry per layer, each None or Past(k, v, gate); None for the list means no past.
    Past(k, v)        keys and values of P earlier positions, k and v (B or 1, nkv, P, hs), keys already
                      rotated. It can be a KV cache or a soft prompt; attention treats both the same way.
    Past(k, v, gate)  side memory: out = (1 - gate) attn + gate softmax(q k^T / sqrt(hs)) v. It takes no
                      positions; with gate 0 the output is exactly that of no past.
    None              this layer has no past: its attention is over the T tokens only.
All entries without a gate have the same P (`past_length`), and the tokens stand at positions P, P + 1, ...
in every layer, also in those whose entry is None.

Attention is causal, except that the first `bidirectional_len[b]` tokens of row b attend to each other (all
tokens: an encoder; those of a prompt: a prefix-LM). Rows are right-padded: under a causal mask no token
attends to a pad behind it, so training and scoring need no padding mask. Decoding keeps a KVCache with one
length per row, and writes each row's new keys and values behind that row's last; rows of similar length
attend together, so that a short row does not read the columns of a long one.

Deviations: q, k, v, gate, up are Linears of their own and rotary pairs are (j, j + hs/2), whatever a family
stores (its rows are split and permuted at load, and back at save); no dropout; `hidden_states` stops before
the head, so that a caller computes logits only at the positions it needs. Every reader goes through `embed`
and `logits`; nothing else calls wte or head.

B batch  T tokens  C width  V vocabulary  nh heads  nkv kv heads  hs head size  P virtual tokens  r rank
S columns of a KV cache  N selected positions
Public: GPTConfig, GPT, Past, past_length, KVCache, generate, sample, filter_logits, token_logprobs,
glm_position_ids, prompt_view
"""
import functools
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.batches.batching import split_by_token_budget
from data.checkpoints.hf import find_family, hf_config, parse_config, read_config, read_state
from data.checkpoints.hf import read_stored, stored_tensors
from data.checkpoints.safetensors import write_tensors
from data.runtime.files import DataError, UserError, write_json


def is_integer(value):
    """Is this a whole number, of Python or numpy, and not a bool?"""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)        # int first: it is quicker


@dataclass(frozen=True)
class GPTConfig:
    """Shape and dialect of a model. A dialect field that is None takes the value of its family's record."""
    vocab_size: int
    block_size: int                     # context length: the largest P + T
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int = None               # fewer than n_head: grouped-query attention. None: n_head
    head_size: int = None               # None: n_embd / n_head
    n_inner: int = None                 # hidden width of the MLP. None: 4 n_embd
    family: str = "gpt2"                # a model_type of data/checkpoints/hf.py
    position: str = None                # "learned" | "rope"
    norm: str = None                    # "layernorm" | "rmsnorm"
    mlp: str = None                     # "gelu" (tanh form) | "gelu_exact" | "swiglu"
    qkv_bias: bool = None
    o_bias: bool = None
    mlp_bias: bool = None
    qk_norm: bool = None                # RMSNorm on every query and key head (Qwen3)
    rotary_fraction: float = None       # the share of a head's numbers that rotary positions turn
    parallel_residual: bool = None      # attention and MLP read the same h (GPT-NeoX)
    post_norm: bool = None              # a norm behind attention and MLP, too (glm4)
    norm_eps: float = 1e-5
    tied: bool = True                   # head.weight is wte.weight
    rope_theta: float = 10000.0
    rope_scaling: dict = None           # None | {"rope_type": "linear" | "llama3", "factor": ..., ...}
    bos: int = None                     # token ids, kept for config.json; nothing in this file reads them
    eos: object = None                  # int, or a list of ints

    def __post_init__(self):
        self.require_counts("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        defaults = dict(n_kv_head=self.n_head, head_size=self.n_embd // self.n_head, n_inner=4 * self.n_embd)
        defaults.update(find_family(self.family).dialect)
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)         # the dataclass is frozen from here on
        choices = dict(position=("learned", "rope"), norm=("layernorm", "rmsnorm"),
                       mlp=("gelu", "gelu_exact", "swiglu"))
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; it can be {' or '.join(known)}")
        rope_type = "linear" if self.rope_scaling is None else self.rope_scaling.get("rope_type")
        if rope_type not in ("linear", "llama3"):
            raise UserError(f"rope_scaling has the rope_type {rope_type!r}; it can be linear or llama3")
        self.require_counts("n_kv_head", "head_size", "n_inner")
        if self.n_head % self.n_kv_head:
            raise UserError(f"{self.n_head} heads cannot share {self.n_kv_head} key/value heads evenly")
        if self.position == "learned" and self.n_embd != self.n_head * self.head_size:
            raise UserError(f"width {self.n_embd} is not {self.n_head} heads times {self.head_size}")
        if self.position == "rope" and (self.head_size % 2 or self.rotary_size % 2):
            raise UserError("rotary positions need pairs, so head_size must be even; it is "
                            f"{self.head_size}, of which {self.rotary_size} turn")

    @property
    def rotary_size(self):
        return int(self.head_size * self.rotary_fraction)

    def require_counts(self, *names):
        """UserError unless these fields are whole numbers above 0."""
        for name in names:
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise UserError(f"{name} is {value!r}; it must be a whole number above 0")

    def as_family(self, name, **changes):
        """The same shape in the dialect of family `name`, with `changes`. UserError if it is unknown."""
        return replace(self, **{"family": name, **find_family(name).dialect, **changes})


class Past(NamedTuple):
    """One layer's keys and values in front of the tokens; with a gate, side memory beside them."""
    k: torch.Tensor                     # (B or 1, nkv, P, hs), already rotated
    v: torch.Tensor                     # (B or 1, nkv, P, hs)
    gate: torch.Tensor = None           # broadcasts to (B, nh, T, hs), as (nh, 1, 1) does


def past_length(past):
    """The number of positions that a past takes: P, or 0 for None and for side memory.

    UserError if an entry is neither None nor a Past, or if two entries without a gate differ in length.
    """
    if past is not None and not isinstance(past, (list, tuple)):
        raise UserError(f"a past is a list with an entry per layer, not a {type(past).__name__}")
    lengths = set()
    for entry in past or ():
        if entry is not None and not isinstance(entry, Past):
            raise UserError(f"an entry of a past is None or Past(k, v, gate), not a {type(entry).__name__}")
        if entry is not None and not (torch.is_tensor(entry.k) and torch.is_tensor(entry.v)):
            raise UserError("k and v of a Past are tensors (B or 1, kv heads, P, head size)")
        if entry is not None and entry.gate is None:
            lengths.add(entry.k.size(2))
    if len(lengths) > 1:
        raise UserError(f"the entries of a past differ in length: {sorted(lengths)}; each must be None or as "
                        "long as the others (decode with a KVCache where only some layers have a past)")
    return max(lengths, default=0)


class KVCache(NamedTuple):
    """Preallocated keys and values for decoding. Row b uses its first lengths[b] columns, the past's P first.

    A layer without an entry in the past has S - P columns.
    """
    layers: list                        # one Past(k, v) per layer, each (B, nkv, S, hs)
    lengths: torch.Tensor               # (B,)
    groups: list = None                 # of rows that attention reads together, see length_groups; None: all

    @property
    def columns(self):
        """S of the widest layer."""
        return max(entry.k.size(2) for entry in self.layers)

    @classmethod
    def extend(cls, filled, lengths, free):
        """A cache of the past that hidden_states returned for B rows, with `free` empty columns behind it."""
        space = (0, 0, 0, free)
        return cls([Past(F.pad(entry.k, space), F.pad(entry.v, space)) for entry in filled], lengths)

    def rows(self, index):
        """The cache of some rows only; index (b,)."""
        return KVCache([Past(entry.k[index], entry.v[index]) for entry in self.layers], self.lengths[index])

    def narrow(self, columns):
        """A view of the first `columns` columns: what the longest row uses."""
        unused = self.columns - columns
        view = [Past(entry.k[:, :, :entry.k.size(2) - unused], entry.v[:, :, :entry.v.size(2) - unused])
                for entry in self.layers]
        return KVCache(view, self.lengths, self.groups)


# ---------------------------------------------------------------------------------------------- the network

class RMSNormFunction(torch.autograd.Function):
    """x w / rms(x). Autograd's own version keeps three copies of x and takes three times as long on a CPU."""

    @staticmethod
    def forward(ctx, x, w, eps):
        ctx.save_for_backward(x, w)
        ctx.eps = eps
        return F.rms_norm(x, w.shape, w, eps)

    @staticmethod
    def backward(ctx, g):                           # dx = r (u - n mean(u n)),  u = g w,  n = x r
        x, w = ctx.saved_tensors
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().div(x.size(-1)).add(ctx.eps).rsqrt()
        dw = (g * x * r).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        u = g * w
        c = (u * x).mean(-1, keepdim=True) * -r ** 3
        return u.mul_(r).addcmul_(x, c), dw, None


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        wide = x.dtype == self.weight.dtype and x.dtype.itemsize > 2        # squares leave fp16's range
        if x.requires_grad and x.device.type == "cpu" and wide:
            return RMSNormFunction.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def make_norm(c):
    return RMSNorm(c.n_embd, c.norm_eps) if c.norm == "rmsnorm" else nn.LayerNorm(c.n_embd, eps=c.norm_eps)


def rope_table(config, positions):
    """positions (...) -> cos and sin of position * frequency, each (..., hs), fp32: bf16 rounds above 256."""
    even = torch.arange(0, config.rotary_size, 2, device=positions.device, dtype=torch.float32)
    freq = config.rope_theta ** (-even / config.rotary_size)
    s = config.rope_scaling
    if s and s["rope_type"] == "linear":
        freq = freq / s["factor"]
    elif s:             # llama3: long wavelengths are stretched, short ones kept, with a ramp between
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)    # within the old context
        ramp = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        freq = torch.lerp(freq / s["factor"], freq, ramp.clamp(0, 1))
    freq = F.pad(freq, (0, config.head_size // 2 - len(freq)))          # (hs/2,): the other pairs stand still
    angle = positions[..., None].float() * freq
    angle = torch.cat((-angle, angle), -1)          # pairs are (j, j + hs/2): (a cos - b sin, b cos + a sin)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):                                                # (B, n, T, hs)
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.size(-1) // 2, -1), sin.to(x.dtype))


def attention_mask(T, P, bidirectional_len, device):
    """Which of P + T columns each of T queries attends to: None (plain causal), or bool (T, P + T) or
    (B, 1, T, P + T)."""
    columns = torch.arange(P + T, device=device)
    if bidirectional_len is not None:
        end = torch.maximum(columns[P:] + 1, P + bidirectional_len[:, None])    # (B, T)
        return (columns < end[:, :, None])[:, None]
    if P and T > 1:                         # SDPA's causal flag aligns the first query with the first column
        return columns <= columns[P:, None]
    return None


def attend(q, k, v, mask):
    """softmax(mask + q k^T / sqrt(hs)) v, causal if mask is None. q (B, nh, T, hs), k and v (B, nkv, S, hs).

    Written out for bf16 with gradients on a CPU: there the fused backward takes ten times as long (T = 72).
    """
    B, nh, T, hs = q.shape
    _, nkv, S, _ = k.shape
    needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
    if not (needs_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu" and S <= 512):
        causal = True if mask is None and T > 1 else False      # torch.compile has no bool for a bare T > 1
        if q.is_cuda and nh != nkv and (mask is not None or q.dtype == torch.float32):
            k = k.repeat_interleave(nh // nkv, 1)               # else CUDA keeps all T x S scores
            v = v.repeat_interleave(nh // nkv, 1)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=nh != k.size(1))
    score = (q.reshape(B, nkv, -1, hs) @ k.mT).view(B, nh, T, S) / math.sqrt(hs)
    hidden = ~torch.ones(T, S, dtype=torch.bool).tril(S - T) if mask is None else ~mask
    p = score.float().masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
    return (p.view(B, nkv, -1, S) @ v).view(B, nh, T, hs)


def attend_by_length(q, k, v, masks):
    """attend for decoding: every group of rows reads as many columns as its longest row has.

    masks   [(rows, mask)], one per group: a slice of the batch, and its mask (b, 1, T, its columns)
    """
    parts = [attend(q[rows], k[rows, :, :mask.size(-1)], v[rows, :, :mask.size(-1)], mask)
             for rows, mask in masks]
    return torch.cat(parts)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.n_head, c.n_kv_head, c.head_size
        self.q = nn.Linear(c.n_embd, c.n_head * c.head_size, bias=c.qkv_bias)
        self.k = nn.Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.v = nn.Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.o = nn.Linear(c.n_head * c.head_size, c.n_embd, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_size, c.norm_eps)
            self.k_norm = RMSNorm(c.head_size, c.norm_eps)

    def forward(self, x, rope, mask, past, cache, columns, select):
        """x (B, T, C) -> (B, T, C), or (N, C) at `select`; and the keys and values used, as Past(k, v).

        mask     None (causal), or bool, (T, S) or (B, 1, T, S): true where a query attends to a column; or
                 masks of groups of rows, as attend_by_length takes them
        past     None or a Past; with a cache only its gated side memory is used here
        cache    None, or Past(k, v) of S columns: new keys and values are written at `columns` (B, 1, T, 1)
        """
        B, T, _ = x.shape
        nh, nkv, hs = self.heads
        q = self.q(x).view(B, T, nh, hs)
        k = self.k(x).view(B, T, nkv, hs)
        v = self.v(x).view(B, T, nkv, hs).transpose(1, 2)               # (B, nkv, T, hs)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = q.transpose(1, 2)                                           # (B, nh, T, hs)
        k = k.transpose(1, 2)                                           # (B, nkv, T, hs)
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        if cache is not None:
            k = cache.k.scatter_(2, columns.expand_as(k), k)            # (B, nkv, S, hs)
            v = cache.v.scatter_(2, columns.expand_as(v), v)
        elif past is not None and past.gate is None:                    # a past of batch 1 serves every row
            k = torch.cat((past.k.to(k.dtype).expand(B, -1, -1, -1), k), 2)     # (B, nkv, P + T, hs)
            v = torch.cat((past.v.to(v.dtype).expand(B, -1, -1, -1), v), 2)
        attention = attend_by_length if isinstance(mask, list) else attend
        y = attention(q, k, v, mask)                                    # (B, nh, T, hs)
        if past is not None and past.gate is not None:
            side_k = past.k.to(q.dtype).expand(B, -1, -1, -1)
            side_v = past.v.to(q.dtype).expand(B, -1, -1, -1)
            memory = F.scaled_dot_product_attention(q, side_k, side_v, enable_gqa=nh != nkv)
            y = torch.lerp(y, memory, past.gate.to(y.dtype))
        y = y.transpose(1, 2).reshape(B, T, nh * hs)
        return self.o(y if select is None else y[select]), Past(k, v)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.up = nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias)
        if c.mlp == "swiglu":
            self.gate = nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias)
        self.down = nn.Linear(c.n_inner, c.n_embd, bias=c.mlp_bias)
        self.gelu_form = "tanh" if c.mlp == "gelu" else "none"

    def forward(self, x):
        if hasattr(self, "gate"):
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate=self.gelu_form))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1 = make_norm(c)
        self.attn = Attention(c)
        self.ln_2 = make_norm(c)
        self.mlp = MLP(c)
        self.post_1 = make_norm(c) if c.post_norm else nn.Identity()
        self.post_2 = make_norm(c) if c.post_norm else nn.Identity()
        self.parallel_residual = c.parallel_residual

    def forward(self, h, rope, mask, past, cache, columns, select):
        y, kv = self.attn(self.ln_1(h), rope, mask, past, cache, columns, select)
        h = h if select is None else h[select]
        y = h + self.post_1(y)
        z = self.ln_2(h if self.parallel_residual else y)
        return y + self.post_2(self.mlp(z)), kv


@functools.cache
def compiled_block():
    """Block's forward through torch.compile: one graph for all blocks, and parameter names do not change."""
    return torch.compile(Block.__call__, dynamic=True)


class GPT(nn.Module):
    """The model. New weights are drawn as in GPT-2: N(0, 0.02), and 0.02 / sqrt(2 n_layer) for o and down."""

    Past = Past                         # for code that is given a model and builds a past without this file

    def __init__(self, config):
        super().__init__()
        if not isinstance(config, GPTConfig):
            raise UserError(f"GPT takes a GPTConfig, not a {type(config).__name__}")
        self.config = config
        self.wte = self.new_embedding(config.vocab_size)
        self.wpe = self.new_embedding(config.block_size) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()
        if config.tied:
            self.head.weight = self.wte.weight

    def new_embedding(self, rows):      # unlike nn.Embedding(rows, C), this draws no random numbers
        return nn.Embedding.from_pretrained(torch.empty(rows, self.config.n_embd), freeze=False)

    def init_weights(self):
        for name, p in self.named_parameters():
            if p.is_meta:               # from_pretrained fills it; drawing on meta would import a compiler
                continue
            if p.dim() == 2:
                residual = name.endswith((".o.weight", ".down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(self, tokens):
        """ids (B, T) -> embeddings (B, T, C), without positions. The only reader of the embedding.

        UserError for an id outside of the vocabulary (on a CPU; CUDA reports it later, in its own words).
        """
        try:
            return self.wte(tokens)
        except IndexError:                              # asking first would wait for a GPU
            raise UserError(f"a token id is not in the vocabulary of this model; ids go from 0 to "
                            f"{self.config.vocab_size - 1}") from None

    def logits(self, hidden):
        """hidden (..., C) after ln_f -> logits (..., V) in the compute dtype. The only caller of the head."""
        return self.head(hidden)

    def forward(self, tokens, targets=None, past=None):
        """Logits (B, T, V) in the compute dtype, and the loss, or None without targets.

        tokens   ids (B, T), or embeddings (B, T, C)
        targets  ids (B, T), -1 (or -100, as in transformers) where a position is ignored. The loss is the
                 mean cross-entropy of the others, in fp32 (NaN if there are none)
        past     see the top of this file
        UserError if tokens or targets are no ids of these shapes, or if P + T is more than the context.
        """
        self.check_tokens(tokens)
        if targets is not None:
            check_targets(targets, tokens)
        hidden, _ = self.hidden_states(tokens, past)
        logits = self.logits(hidden)                                    # (B, T, V)
        if targets is None:
            return logits, None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = targets.long().masked_fill(targets == -100, -1)
        try:
            return logits, F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-1)
        except IndexError:
            raise UserError("a target is not in the vocabulary of this model; targets go from 0 to "
                            f"{self.config.vocab_size - 1}, and -1 or -100 are ignored") from None

    # Many parameters, but a caller names the few that it uses.
    def hidden_states(self, tokens, past=None, cache=None, select=None, bidirectional_len=None,
                      glm_positions=None, gradient_checkpointing=False, compile=False, start_layer=None,
                      stop_layer=None):
        """Everything below the head.

        tokens      ids (B, T), or embeddings (B, T, C); positions are added here in both cases
        past        None, or one entry per layer, see the top of this file. It is the same in every call that
                    continues a row
        cache       None, or a KVCache, which holds the past's keys and values too: row b's tokens stand at
                    positions lengths[b], lengths[b] + 1, ..., and the new keys and values are written there
        select      None, or (b, t), two (N,): positions at which the result is needed. The last block
                    computes its o and MLP there only
        bidirectional_len   None (causal), or (B,): the first tokens of each row, which attend to each other
        glm_positions       None, or (2, B, T): position in the text (P not included), and in the span (0:
                            in none); Du et al. 2022 (2103.10360), section 2.1
        gradient_checkpointing  recompute each block in backward instead of keeping its activations
        compile     run each block through torch.compile; as gradient_checkpointing, only with gradients
        stop_layer  None, or the block before which to stop: returned is what enters it, (B, T, C), without
                    ln_f. Models that differ only from there on share it
        start_layer None, or the block with which to go on: `tokens` are what enters it, as stop_layer
                    returned it
        Returns hidden (B, T, C), or (N, C), after ln_f; and the past of all P + T positions: Past(k, v) of
        each block that ran, or the layers of the cache. Side memory is not part of it.
        UserError if tokens are not of these shapes, if the past does not fit the model, if P + T (or a
        cache) is more than the context, or if there are no such blocks.
        """
        self.check_tokens(tokens)
        if past is not None:
            self.check_past(past, len(tokens))
        P = past_length(past)
        positions = torch.arange(tokens.size(1), device=tokens.device)      # (T,) or (B, T)
        positions = positions + (P if cache is None else cache.lengths[:, None])
        self.check_context(P, tokens.size(1), cache, bidirectional_len)
        self.check_layers(start_layer, stop_layer, tokens, select)
        h, rope = self.input_states(tokens, P, positions, glm_positions, start_layer)
        past = past or [None] * self.config.n_layer
        views = layer_views(past, cache, positions, bidirectional_len)

        with_grad = torch.is_grad_enabled()
        run = compiled_block() if compile and with_grad else Block.__call__
        made = []
        end = self.config.n_layer if stop_layer is None else stop_layer
        for i in range(start_layer or 0, end):
            mask, layer_cache, columns = views[i]
            last = i == self.config.n_layer - 1
            args = (self.blocks[i], h, rope, mask, past[i], layer_cache, columns, select if last else None)
            if gradient_checkpointing and with_grad:
                h, kv = checkpoint(run, *args, use_reentrant=False)
            else:
                h, kv = run(*args)
            made.append(kv)
        return (self.ln_f(h) if stop_layer is None else h), made

    def check_layers(self, start_layer, stop_layer, tokens, select):
        """UserError unless there are blocks start_layer .. stop_layer - 1 and what they take is given."""
        n = self.config.n_layer
        start = 0 if start_layer is None else start_layer
        stop = n if stop_layer is None else stop_layer
        if not (is_integer(start) and is_integer(stop) and 0 <= start <= stop <= n):
            raise UserError(f"start_layer {start_layer!r} and stop_layer {stop_layer!r} must be whole numbers, "
                            f"in this order, from 0 to {n}")
        if start_layer is not None and tokens.dim() == 2:
            raise UserError(f"block {start_layer} takes what stop_layer={start_layer} returned, (B, T, C), and "
                            "not token ids")
        if select is not None and (stop_layer is not None or start_layer == n):
            raise UserError("select is for the last block, and this call does not run it")

    def check_tokens(self, tokens):
        """UserError unless tokens are ids (B, T) or embeddings (B, T, C), by type and shape: no number is
        read."""
        if torch.is_tensor(tokens):
            if tokens.dim() == 2 and tokens.dtype in (torch.int64, torch.int32):
                return
            if tokens.dim() == 3 and tokens.is_floating_point() and tokens.size(2) == self.config.n_embd:
                return
            found = f"{tokens.dtype} {list(tokens.shape)}"
        else:
            found = f"a {type(tokens).__name__}"
        raise UserError(f"tokens are {found}; they must be a tensor of ids (B, T), int64 or int32, or of "
                        f"embeddings (B, T, {self.config.n_embd}); torch.tensor([ids]) is a batch of one row")

    def check_past(self, past, B):
        """UserError unless every entry is None or fits the layer and a batch of B rows."""
        past_length(past)
        if len(past) != self.config.n_layer:
            raise UserError(f"the past has {len(past)} entries and the model {self.config.n_layer} layers; "
                            "give one per layer, None where a layer has no past")
        _, nkv, hs = self.blocks[0].attn.heads
        for i, entry in enumerate(past):
            for t in entry[:2] if entry is not None else ():
                if t.dim() != 4 or t.size(0) not in (1, B) or t.size(1) != nkv or t.size(3) != hs:
                    raise UserError(f"past[{i}] holds {list(t.shape)}; k and v must be (1 or {B}, {nkv}, P, "
                                    f"{hs})")

    def check_context(self, P, T, cache, bidirectional_len):
        context = self.config.block_size
        if cache is None and P + T > context:
            raise UserError(f"{P} past positions and {T} tokens do not fit the context of {context}; use "
                            "shorter texts or fewer virtual tokens")
        if cache is None:
            return
        if cache.columns > context:
            raise UserError(f"a cache of {cache.columns} columns does not fit the context of {context}")
        if bidirectional_len is not None:
            raise UserError("bidirectional_len belongs to the call that reads a prompt; behind a cache, "
                            "attention is causal")

    def input_states(self, tokens, P, positions, glm_positions, start_layer):
        """What enters the first block to run, (B, T, C): without a start_layer the embeddings, learned positions
        added; and rotary (cos, sin), or None where positions are learned."""
        h = self.embed(tokens) if tokens.dim() == 2 else tokens.to(self.wte.weight.dtype)
        in_span = None
        if glm_positions is not None:
            in_text, in_span = glm_positions                            # (B, T) each
            positions = P + in_text
        if self.wpe is None:
            if in_span is not None:         # one angle for the sum of both
                positions = positions + in_span
            cos, sin = rope_table(self.config, positions)               # (T, hs) or (B, T, hs)
            if positions.dim() == 2:
                cos = cos[:, None]                                      # (B, 1, T, hs), for all heads
                sin = sin[:, None]
            return h, (cos, sin)
        if start_layer is not None:
            return h, None
        if in_span is not None:     # one table for both, positions in spans from its end, which no text reaches
            h = h + self.wpe(-in_span % self.config.block_size) * (in_span > 0)[..., None]
        return h + self.wpe(positions), None

    # ---------------------------------------------------------------------------------- Hugging Face folders

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32):
        """Read a Hugging Face folder (config.json; model.safetensors, or shards with an index), strictly.

        Every tensor must be there, in shape, and no other beside it; DataError names the first that is not.
        Sizes are compared with the weights before anything is built. Weights that need neither reshaping nor
        a cast stay memory-mapped: processes share them.
        """
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UserError(f"dtype is {dtype!r}; weights take a floating torch dtype, such as torch.float32")
        try:
            config = GPTConfig(**read_config(folder))
        except DataError:
            raise
        except UserError as e:                          # GPTConfig refuses the shape
            raise DataError(f"{folder}/config.json: {e}") from None
        stored = read_stored(config, folder)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(read_state(model, stored, folder, dtype), assign=True)
        if config.tied:
            model.head.weight = model.wte.weight
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, each atomically, as `transformers` reads them.

        UserError if no family of transformers has this mix of GPTConfig fields, and for a quantized model;
        nothing is written then.
        """
        if any(getattr(m, "quant", None) is not None for m in self.modules()):
            raise UserError(f"{folder}: a quantized model has no Hugging Face form; lora.merge dequantizes it")
        reread = GPTConfig(**parse_config(hf_config(self.config, torch.float32), folder))
        odd = [f.name for f in fields(reread) if getattr(reread, f.name) != getattr(self.config, f.name)]
        if odd:
            raise UserError(f"{folder}: transformers knows no {self.config.family} with this "
                            f"{' '.join(odd)}, so this hybrid has no Hugging Face form")
        tensors = {name: t.contiguous() for name, t in stored_tensors(self).items()}
        widest = max((t.dtype for t in tensors.values()), key=lambda dtype: dtype.itemsize)
        write_tensors(os.path.join(folder, "model.safetensors"), tensors)
        write_json(os.path.join(folder, "config.json"), hf_config(self.config, widest))     # what loaders use


def check_targets(targets, tokens):
    """UserError unless targets are ids of the shape of `tokens`."""
    found = type(targets).__name__
    if torch.is_tensor(targets):
        found = f"{targets.dtype} {list(targets.shape)}"
        if targets.shape == tokens.shape[:2] and not targets.is_floating_point():
            return
    raise UserError(f"targets are {found}, but these tokens need ids {list(tokens.shape[:2])} (give a past "
                    "by name)")


def layer_views(past, cache, positions, bidirectional_len):
    """For every layer: attention mask, or None, or masks of the cache's groups of rows; its part of the cache or
    None, and where to write in it.

    A layer without an entry in the past lacks the P columns in front of the tokens, in its mask and cache.
    """
    P = past_length(past)
    T = positions.size(-1)
    masks = {}                                          # two at most: with the P columns and without
    views = []
    for i, entry in enumerate(past):
        front = P if entry is not None and entry.gate is None else 0
        layer_cache = None if cache is None else cache.layers[i]
        if front not in masks and cache is None:
            masks[front] = attention_mask(T, front, bidirectional_len, positions.device), None
        elif front not in masks:
            columns = (positions - (P - front))[:, None, :, None]                   # (B, 1, T, 1)
            S = layer_cache.k.size(2)
            mask = torch.arange(S, device=columns.device) <= columns                    # (B, 1, T, S)
            if cache.groups is not None:
                missing = cache.columns - S                                     # columns of the past
                mask = [(rows, mask[rows, ..., :n - missing]) for rows, n in cache.groups]
            masks[front] = mask, columns
        mask, columns = masks[front]
        views.append((mask, layer_cache, columns))
    return views


# ----------------------------------------------------------------------------------- scoring and generation

class TokenLogprobs(torch.autograd.Function):
    """token_logprobs under a frozen head: keeps d(-log p) / d hidden (N, C) in place of the logits (N, V)."""

    @staticmethod
    def forward(ctx, hidden, tokens, logits_fn):
        out = []
        gradients = []
        for h, t in zip(hidden.split(128), tokens.split(128)):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                logits = logits_fn(h)                                   # (n, V)
            z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
            p = z.softmax(-1)
            logsumexp = z.amax(-1) - p.amax(-1).log()
            out.append(z.gather(-1, t[:, None])[:, 0] - logsumexp)
            p.scatter_add_(-1, t[:, None], p.new_full((len(t), 1), -1.0))           # softmax - one-hot
            gradients += torch.autograd.grad(logits, h, p.to(logits.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(out)

    @staticmethod
    def backward(ctx, g):
        gradients, = ctx.saved_tensors
        return gradients * -g[:, None].to(gradients.dtype), None, None


def token_logprobs(logits_fn, hidden, tokens):
    """log p of one token per row: hidden (N, C), ids (N,) -> (N,), fp32 or wider.

    logits_fn: hidden (n, C) -> logits (n, V), as `model.logits`.
    Logits (N, V) can be larger than the model, so they are computed in slices. If the head is frozen, a slice
    keeps its gradient (n, C) for backward instead of its logits.
    """
    with_grad = torch.is_grad_enabled()
    if with_grad and not logits_fn(hidden[:0].detach()).requires_grad:
        return TokenLogprobs.apply(hidden, tokens, logits_fn)
    out = []
    size = max(1, len(hidden)) if with_grad else 256
    for h, t in zip(hidden.split(size), tokens.split(size)):
        z = logits_fn(h)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        out.append(-F.cross_entropy(z, t, reduction="none"))
    return torch.cat(out)


def filter_logits(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V) / temperature, -inf where top_k, and then top_p, exclude a token.

    Temperature 0 leaves the likeliest token only.
    """
    if temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ranked, order = logits.sort(-1, descending=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)     # probability of the likelier tokens
        cut = (before >= top_p).index_fill(-1, order.new_zeros(1), False)   # the likeliest always stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -torch.inf)
    return logits


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None, uniforms=None):
    """One token (B,) per row of logits (B, V), by temperature (0: greedy), then top_k, then top_p.

    uniforms  None, or (B,) in [0, 1): row b takes the token at which its cumulative distribution passes
              uniforms[b], and no random number is drawn
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
    if uniforms is None:
        return torch.multinomial(p, 1, generator=generator)[:, 0]
    cumulative = p.cumsum(-1)                                           # (B, V)
    u = uniforms[:, None] * (1 - 2 ** -20)      # below the total: rounding must not take a filtered token
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]


def glm_position_ids(columns, prompt_lengths):
    """GLM positions (2, B, T) of the tokens at columns (T,) or (B, T), counted from a row's first token.

    The prompts, `prompt_lengths` (B,) long, end in a mask and a start token. From the start token on, a token
    has the mask's position in the text, and counts 1, 2, ... in the span that replaces the mask.
    """
    mask = prompt_lengths[:, None] - 2
    return torch.stack((torch.minimum(columns, mask), (columns - mask).clamp(min=0)))


# The parameters of sampling stay flat, under the names that `transformers` gives them.
@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos=None, past=None,
             generator=None, uniforms=None, embed=None, bidirectional_prompt=False, infill_suffix=False):
    """Continue prompts of any lengths, as one batch with a KV cache. Returns the new ids, a list per prompt.

    prompts     list of non-empty lists of token ids
    eos         an id, or a collection of ids, that ends a row, and stays in it; a full context ends it too
    past        a soft prompt: one entry per layer, of batch 1, see the top of this file
    generator   a torch.Generator; or in its place
    uniforms    (B, max_new_tokens) in [0, 1), so that a sampled row does not depend on its neighbours
    embed       ids (B, T) -> embeddings (B, T, C), where virtual tokens stand inside the prompts
    bidirectional_prompt    the tokens of a prompt attend to each other, as in a prefix-LM
    infill_suffix           a prompt ends in a mask and a start token, and the answer replaces the mask (GLM)
    Greedy rows do not depend on their neighbours. Finished rows leave the batch, so that late steps compute
    only what still runs. The caller decides .eval() and autocast.
    UserError if a prompt is empty or too long, or an argument is out of range.
    """
    check_generate(prompts, max_new_tokens, temperature, top_k, top_p, past, uniforms, eos)
    new = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return new
    stop = {eos} if is_integer(eos) else set(eos or ())
    sizes = [len(prompt) for prompt in prompts]
    free = [model.config.block_size - past_length(past) - size for size in sizes]
    limits = [min(max_new_tokens, columns + 1) for columns in free]     # the last token needs no column
    alive = sorted(range(len(prompts)), key=sizes.__getitem__)          # rows that are not finished
    cache, hidden = read_prompts(model, [prompts[row] for row in alive], [limits[row] for row in alive], past,
                                 embed, bidirectional_prompt, infill_suffix)
    while True:
        u = None if uniforms is None else uniforms[alive, len(new[alive[0]])]
        tokens = sample(model.logits(hidden), temperature, top_k, top_p, generator, u)      # (rows alive,)
        for row, token in zip(alive, tokens.tolist()):
            new[row].append(token)
        kept = [i for i, row in enumerate(alive) if new[row][-1] not in stop and len(new[row]) < limits[row]]
        if not kept:
            return new
        if len(kept) < len(alive):
            index = torch.tensor(kept, device=tokens.device)
            alive = [alive[i] for i in kept]
            tokens = tokens[index]
            cache = cache.rows(index)
        lengths = [past_length(past) + sizes[row] + len(new[row]) for row in alive]     # upwards
        if tokens.device.type == "cpu":         # on a GPU more calls cost more than fewer columns save
            cache = cache._replace(groups=length_groups(lengths))
        glm_positions = None
        if infill_suffix:
            prompt_lengths = tokens.new_tensor([sizes[row] for row in alive])
            glm_positions = glm_position_ids(cache.lengths[:, None] - past_length(past), prompt_lengths)
        hidden, _ = model.hidden_states(tokens[:, None], past, cache=cache.narrow(lengths[-1]),
                                        glm_positions=glm_positions)
        hidden = hidden[:, 0]                                           # (rows alive, C)
        cache = cache._replace(lengths=cache.lengths + 1)


def length_groups(lengths, least=256):
    """Rows of ascending lengths in groups [(slice, columns of its longest)], or None for a single one.

    A cut between short and long rows spares the short ones the columns of the long ones; one that spares
    fewer than `least` columns in all costs more, in calls, than it saves.
    """
    groups = []
    end = len(lengths)
    while end:
        spared = [row * (lengths[end - 1] - lengths[row - 1]) for row in range(1, end)]     # by a cut at row
        most = max(spared, default=0)
        begin = 1 + spared.index(most) if most >= least else 0
        groups.append((slice(begin, end), lengths[end - 1]))
        end = begin
    return groups[::-1] if len(groups) > 1 else None


def check_generate(prompts, max_new_tokens, temperature, top_k, top_p, past, uniforms, eos):
    rows = isinstance(prompts, (list, tuple)) and all(isinstance(prompt, list) for prompt in prompts)
    if not rows or not all(is_integer(token) for prompt in prompts for token in prompt):
        raise UserError(f"generate: prompts are a {type(prompts).__name__}; they must be a list of lists of "
                        "token ids, as tensor.tolist() gives of ids (B, T)")
    ends = () if eos is None else [eos] if is_integer(eos) else eos
    if not isinstance(ends, Collection) or not all(map(is_integer, ends)):
        raise UserError(f"generate: eos is {eos!r:.80}; it must be a token id, or a collection of them")
    if not is_integer(max_new_tokens) or not is_integer(1 if top_k is None else top_k):
        raise UserError(f"generate: max_new_tokens {max_new_tokens!r} and top_k {top_k!r} must be whole numbers")
    if not all(isinstance(number, (int, float)) for number in (temperature, top_p) if number is not None):
        raise UserError(f"generate: temperature {temperature!r} and top_p {top_p!r} must be numbers")
    if not all(prompts):
        raise UserError("generate: a prompt is empty; give it at least one token (end-of-text will do)")
    if not (temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 <= top_p <= 1)):
        raise UserError(f"generate: temperature {temperature}, top_k {top_k}, top_p {top_p} cannot be; they "
                        "are 0 (greedy) or more, 1 or more, and 0 to 1")
    past_length(past)
    if any(entry is not None and entry.k.size(0) != 1 for entry in past or ()):
        raise UserError("generate: past must have batch 1; it serves every row")
    if uniforms is not None and not torch.is_tensor(uniforms):
        raise UserError(f"generate: uniforms are a {type(uniforms).__name__}; they must be a tensor (B, T)")
    if uniforms is not None and (len(uniforms) != len(prompts) or uniforms.size(1) < max_new_tokens):
        raise UserError(f"generate: uniforms are {list(uniforms.shape)}; {len(prompts)} prompts and "
                        f"{max_new_tokens} new tokens need {[len(prompts), max_new_tokens]}")


def read_prompts(model, prompts, limits, past, embed, bidirectional_prompt, infill_suffix):
    """A KVCache filled with the prompts, with room for limits[b] new tokens; and hidden (B, C) at their ends.

    A prompt that is asked several times is read once. Prompts are read in parts of similar length, so that
    hardly a pad is computed.
    """
    device = model.wte.weight.device
    asked = {}                                                          # {prompt: its rows}
    for row, prompt in enumerate(prompts):
        asked.setdefault(tuple(prompt), []).append(row)
    distinct = list(asked)
    P = past_length(past)
    columns = P + max(len(prompt) + max(limit, 1) - 1 for prompt, limit in zip(prompts, limits))
    budget = 512 if device.type == "cpu" else 16384
    layers = None
    last = [None] * len(prompts)
    for part in split_by_token_budget(range(len(distinct)), [len(prompt) for prompt in distinct], budget):
        some = [distinct[i] for i in part]
        n = torch.tensor([len(prompt) for prompt in some], device=device)           # (b,)
        T = max(map(len, some))
        x = torch.tensor([[*prompt] + [0] * (T - len(prompt)) for prompt in some], device=device)   # (b, T)
        view = prompt_view(T, n, bidirectional_prompt, infill_suffix)
        view["select"] = torch.arange(len(part), device=device), n - 1
        hidden, made = model.hidden_states(embed(x) if embed else x, past, **view)      # (b, C)
        if layers is None:
            free = columns - max(entry.k.size(2) for entry in made)
            layers = [empty_cache(entry, len(prompts), free) for entry in made]
        rows = [row for prompt in some for row in asked[prompt]]
        source = [i for i, prompt in enumerate(some) for _ in asked[prompt]]        # of each of these rows
        for entry, layer in zip(made, layers):
            layer.k[rows, :, :entry.k.size(2)] = entry.k[source]
            layer.v[rows, :, :entry.v.size(2)] = entry.v[source]
        for row, i in zip(rows, source):
            last[row] = hidden[i]
    sizes = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return KVCache(layers, P + sizes), torch.stack(last)


def prompt_view(T, n, bidirectional_prompt, infill_suffix):
    """How `hidden_states` reads prompts of n (B,) tokens in T columns: keywords of it."""
    view = {}
    if bidirectional_prompt:
        view["bidirectional_len"] = n - 1 if infill_suffix else n       # the start token is causal
    if infill_suffix:
        view["glm_positions"] = glm_position_ids(torch.arange(T, device=n.device), n)
    return view


def empty_cache(entry, rows, free):
    """Zeros in the dtype and shape of `entry`, for `rows` rows and with `free` more columns."""
    _, nkv, columns, hs = entry.k.shape
    shape = (rows, nkv, columns + free, hs)
    return Past(entry.k.new_zeros(shape), entry.v.new_zeros(shape))
