"""model.py: one decoder for two families, GPT-2 and Llama (Llama, SmolLM2, Qwen2, Qwen3).

    h_0     = wte[x] (+ wpe[p])                                tokens in; learned positions for GPT-2
    h       = h + o(softmax(mask + q k^T / sqrt(hs)) v)        q, k, v = heads of ln_1(h); rotated for Llama
    h       = h + down(gelu(up(z)))                            z = ln_2(h)   (GPT-2)
    h       = h + down(silu(gate(z)) * up(z))                                (Llama)
    logits  = head(ln_f(h))

GPT-2: Radford et al. 2019. Llama: Touvron et al. 2023 (arXiv 2302.13971). Rotary positions: Su et al. 2021
(2104.09864). Grouped key/value heads: Ainslie et al. 2023 (2305.13245). The family is a handful of GPTConfig
fields, not a class.

One hook: `past`, a list with one entry per layer, goes in and comes out. An entry is
    (k, v)         keys and values of P earlier positions, each (B or 1, nkv, P, hs), keys already rotated.
                   It is a KV cache when we decode and a soft prompt when we tune one: the model cannot tell.
                   Real tokens sit at positions P, P+1, ...
    (k, v, gate)   side memory: out = (1 - gate) attn + gate attn(q, k, v). It takes no positions, and with
                   gate 0 it is exactly no prompt.
Rows are right-padded. Under causal attention a pad behind a row cannot be seen from inside it, so training,
scoring and decoding need no mask; decoding keeps one length per row and writes where that row ends.

Who sees whom is decided in `trunk`: causal, unless `sees` (B,) says how many tokens of a row, from its first,
see each other both ways (a whole row: an encoder; a question: prefix-LM). The rest of the row stays causal.

Deviations: q, k, v are always three Linears (a fused GPT-2 `c_attn` is split at load and joined at save); no
dropout; the trunk never computes logits, so a caller pays for the vocabulary only where it asks.

B batch  T tokens  P past positions  S cache columns  C width  V vocabulary
nh heads  nkv key/value heads  hs head size
Public: GPTConfig, GPT, generate, sample, allowed, logprob
"""
import functools
import math
import os
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as rematerialise

from data.batches.batching import micro
from data.checkpoints.safetensors import write_tensors
from data.runtime.files import DataError, UserError, write_json
from data.checkpoints.hf import hf_config, hf_names, parse_config, read_config, read_weights


@dataclass(frozen=True)
class GPTConfig:
    """Shape and dialect of a model. The defaults are GPT-2's; `llama()` turns the dialect fields over."""
    vocab_size: int
    block_size: int                     # context: the largest P + T
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int = None               # fewer than n_head: grouped-query attention. None: n_head
    head_size: int = None               # None: n_embd / n_head
    n_inner: int = None                 # hidden width of the MLP. None: 4 n_embd
    position: str = "learned"           # "learned" | "rope"
    norm: str = "layernorm"             # "layernorm" | "rmsnorm"
    mlp: str = "gelu"                   # "gelu" (tanh form) | "swiglu"
    norm_eps: float = 1e-5
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False               # RMSNorm on every query and key head (Qwen3)
    tied: bool = True                   # head.weight is wte.weight
    rope_theta: float = 10000.0
    rope_scaling: dict = None           # None | {"rope_type": "linear" | "llama3", "factor": ..., ...}
    bos: int = None                     # token ids, kept for config.json; nothing in here reads them
    eos: object = None                  # int, or a list of ints

    def __post_init__(self):
        for name, words in (("position", ("learned", "rope")), ("norm", ("layernorm", "rmsnorm")),
                            ("mlp", ("gelu", "swiglu"))):
            if getattr(self, name) not in words:
                raise UserError(f"{name} is {getattr(self, name)!r}; it can be {' or '.join(words)}")
        for name, value in (("n_kv_head", self.n_head), ("head_size", self.n_embd // self.n_head),
                            ("n_inner", 4 * self.n_embd)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)           # the dataclass is frozen from here on
        if self.n_head % self.n_kv_head:
            raise UserError(f"{self.n_head} heads cannot share {self.n_kv_head} key/value heads evenly")
        if self.position == "learned" and self.n_embd != self.n_head * self.head_size:
            raise UserError(f"width {self.n_embd} is not {self.n_head} heads times {self.head_size}")
        if self.position == "rope" and self.head_size % 2:
            raise UserError(f"rotary positions turn pairs, so head_size must be even; it is {self.head_size}")

    @property
    def family(self):
        if self.position == "learned":
            return "gpt2"
        return "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias and not self.o_bias else "llama"

    def llama(self, **changes):
        """The same shape in the Llama dialect."""
        plain = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), False)
        return replace(self, **{"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", **plain, **changes})


# ---------------------------------------------------------------------------------------------- the network

class NormByHand(torch.autograd.Function):
    """x w / rms(x). Left to autograd it keeps three copies of x and takes three times as long on a CPU."""

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
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        if x.requires_grad and x.device.type == "cpu" and x.dtype == self.weight.dtype != torch.bfloat16:
            return NormByHand.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_table(config, positions):
    """cos and sin of position * frequency, each (..., T, hs), in fp32: bf16 cannot count past 256."""
    half = torch.arange(0, config.head_size, 2, device=positions.device, dtype=torch.float32)
    freq = config.rope_theta ** (-half / config.head_size)              # (hs/2,)
    s = config.rope_scaling
    if s and s["rope_type"] == "linear":
        freq = freq / s["factor"]
    elif s:                             # llama3: long waves are stretched, short ones kept, a ramp between
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)    # in the old context
        ramp = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        freq = torch.lerp(freq / s["factor"], freq, ramp.clamp(0, 1))
    angle = positions[..., None].float() * freq
    angle = torch.cat((-angle, angle), -1)          # halves turn: (a, b) -> (a cos - b sin, b cos + a sin)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):                                                # (B, n, T, hs)
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.size(-1) // 2, -1), sin.to(x.dtype))


def attend(q, k, v, mask):
    """softmax(mask + q k^T / sqrt(hs)) v, causal if no mask: (B, nh, T, hs), (B, nkv, S, hs) twice -> q's.

    Written out where it learns in bf16 on a CPU: there the fused backward is ten times slower (T = 72).
    """
    (B, nh, T, hs), nkv, S = q.shape, k.size(1), k.size(2)
    learns = q.requires_grad or k.requires_grad or v.requires_grad
    if not (learns and q.dtype == torch.bfloat16 and q.device.type == "cpu" and S <= 512):
        causal = True if mask is None and T > 1 else False      # torch.compile has no bool for a bare T > 1
        if q.is_cuda and nh != nkv and (mask is not None or q.dtype == torch.float32):
            k, v = (t.repeat_interleave(nh // nkv, 1) for t in (k, v))      # else CUDA keeps all T x S scores
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=nh != k.size(1))
    score = (q.reshape(B, nkv, -1, hs) @ k.mT).view(B, nh, T, S) / math.sqrt(hs)
    hidden = ~torch.ones(T, S, dtype=torch.bool).tril(S - T) if mask is None else ~mask
    p = score.float().masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
    return (p.view(B, nkv, -1, S) @ v).view(B, nh, T, hs)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.n_head, c.n_kv_head, c.head_size
        self.q = nn.Linear(c.n_embd, c.n_head * c.head_size, bias=c.qkv_bias)
        self.k = nn.Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.v = nn.Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.o = nn.Linear(c.n_head * c.head_size, c.n_embd, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_size, c.norm_eps), RMSNorm(c.head_size, c.norm_eps)

    def forward(self, x, past, rope, mask, slots, at=None):
        B, T, _ = x.shape
        nh, nkv, hs = self.heads
        q = self.q(x).view(B, T, nh, hs)
        k = self.k(x).view(B, T, nkv, hs)
        v = self.v(x).view(B, T, nkv, hs).transpose(1, 2)               # (B, nkv, T, hs)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)                     # (B, nh or nkv, T, hs)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        past, side = (past[:-3], past[-3:]) if past and len(past) in (3, 5) else (past, ())
        if slots is not None:                                           # decoding: write where each row ends
            k, v = (cache.scatter_(2, slots.expand_as(t), t) for cache, t in zip(past, (k, v)))
        elif past:                                                      # a batch-1 past serves every row
            k, v = (torch.cat((p.to(t.dtype).expand(B, -1, -1, -1), t), 2) for p, t in zip(past, (k, v)))
        y = attend(q, k, v, mask)                                       # (B, nh, T, hs)
        if side:
            kp, vp = (t.to(q.dtype).expand(B, -1, -1, -1) for t in side[:2])
            memory = F.scaled_dot_product_attention(q, kp, vp, enable_gqa=nh != nkv)
            y = torch.lerp(y, memory, side[2].to(y.dtype))
        y = y.transpose(1, 2).reshape(B, T, nh * hs)
        return self.o(y if at is None else y[at]), (k, v, *side)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.up = nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias)
        if c.mlp == "swiglu":
            self.gate = nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias)
        self.down = nn.Linear(c.n_inner, c.n_embd, bias=c.mlp_bias)

    def forward(self, x):
        if hasattr(self, "gate"):
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        norm = RMSNorm if c.norm == "rmsnorm" else nn.LayerNorm
        self.ln_1, self.attn = norm(c.n_embd, eps=c.norm_eps), Attention(c)
        self.ln_2, self.mlp = norm(c.n_embd, eps=c.norm_eps), MLP(c)

    def forward(self, h, past, rope, mask, slots, at=None):
        y, past = self.attn(self.ln_1(h), past, rope, mask, slots, at)
        h = (h if at is None else h[at]) + y
        return h + self.mlp(self.ln_2(h)), past


@functools.cache
def compiled():
    """A block's forward through torch.compile: one for all blocks, whose names and weights stay theirs."""
    return torch.compile(Block.__call__, dynamic=True)


class GPT(nn.Module):
    """A decoder. A new one draws its weights as GPT-2 did: N(0, 0.02), less where they feed the residual."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        table = lambda rows: nn.Embedding.from_pretrained(torch.empty(rows, c.n_embd), freeze=False)
        self.wte = table(c.vocab_size)
        self.wpe = table(c.block_size) if c.position == "learned" else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = (RMSNorm if c.norm == "rmsnorm" else nn.LayerNorm)(c.n_embd, eps=c.norm_eps)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.is_meta:               # from_pretrained fills it; drawing on meta imports a compiler first
                continue
            if p.dim() == 2:
                shrink = math.sqrt(2 * c.n_layer) if name.endswith((".o.weight", ".down.weight")) else 1.0
                nn.init.normal_(p, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if c.tied:
            self.head.weight = self.wte.weight

    def trunk(self, x, past=None, lengths=None, checkpoint=False, compile=False, sees=None, places=None,
              at=None):
        """Everything below the head.

        x           ids (B, T), or embeddings (B, T, C) in their place (positions are added here either way)
        past        None, or one entry per layer, see the top of this file
        lengths     None, or (B,): `past` holds preallocated caches (B, nkv, S, hs), row b has used lengths[b]
                    of the S columns, and the T new keys and values are written in place behind those
        checkpoint  recompute each block in backward instead of keeping its activations
        compile     run each block as torch.compile makes it; both where gradients are asked for, only
        sees        None: causal; or (B,), the tokens at the start of each row that see each other both ways
        places      None, or (2, B, T): position in the text, and in the span that fills it (0: is no span)
        at          None, or (b, t), two (N,): only what stands there is asked for, and the last block spends
                    its o and MLP there alone
        Returns hidden (B, T, C), or (N, C), after ln_f, and the past of all P+T positions (the caches, given
        `lengths`).
        """
        T, device = x.size(1), x.device
        P = past[0][0].size(2) if past and len(past[0]) != 3 else 0     # side memory takes no positions
        S = P + T if lengths is None else P
        if S > self.config.block_size:
            raise UserError(f"{P} past positions and {T} tokens do not fit the context of "
                            f"{self.config.block_size}; use shorter texts or fewer virtual tokens")
        positions = torch.arange(T, device=device) + (P if lengths is None else lengths[:, None])
        mask = slots = rope = None                                      # positions: (T,) or (B, T)
        if lengths is not None:
            slots = positions[:, None, :, None]                         # (B, 1, T, 1)
            mask = torch.arange(S, device=device) <= slots              # (B, 1, T, S)
        elif sees is not None:                                          # a query sees columns 0 .. reach - 1
            reach = torch.maximum(positions + 1, P + sees[:, None])     # (B, T)
            mask = (torch.arange(S, device=device) < reach[:, :, None])[:, None]        # (B, 1, T, S)
        elif P and T > 1:           # SDPA's own causal flag counts from the top left: wrong behind a past
            mask = torch.arange(S, device=device) <= positions[:, None]         # (T, S)
        h = self.wte(x) if x.dim() == 2 else x.to(self.wte.weight.dtype)        # (B, T, C)
        if places is not None:      # rotary: one angle for both channels. Learned: one table, whose end no
            front, within = P * (lengths is None), places[1]                                    # text reaches
            positions = front + places[0] + within * (self.wpe is None)
            if self.wpe is not None:
                h = h + self.wpe(-within % self.config.block_size) * (within > 0)[..., None]
        if self.wpe is not None:
            h = h + self.wpe(positions)
        else:
            rope = rope_table(self.config, positions)
            rope = rope if positions.dim() == 1 else [t[:, None] for t in rope]         # for all heads
        out, learns = [], torch.is_grad_enabled()
        run = compiled() if compile and learns else Block.__call__
        for block, entry in zip(self.blocks, past or [None] * len(self.blocks), strict=True):
            given = block, h, entry, rope, mask, slots, at if block is self.blocks[-1] else None
            if checkpoint and learns:
                h, kv = rematerialise(run, *given, use_reentrant=False)
            else:
                h, kv = run(*given)
            out.append(kv)
        return self.ln_f(h), out

    def forward(self, x, past=None):
        """ids (B, T) or embeddings (B, T, C) -> logits (B, T, V), past. Logits come in the compute dtype."""
        hidden, past = self.trunk(x, past)
        return self.head(hidden), past

    # ---------------------------------------------------------------------------------- Hugging Face folders

    def hf_names(self):
        """Our module path -> (Hugging Face module path, part); part: q, k or v of a fused c_attn, or None."""
        return hf_names(self)

    def conv1d(self, name, t):
        """GPT-2's blocks store their matrices (in, out); this turns them over, in either direction."""
        return t.t() if self.config.family == "gpt2" and t.dim() == 2 and name.startswith("blocks.") else t

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32):
        """Read a Hugging Face folder (config.json; model.safetensors, or shards with an index), strictly.

        Every tensor must be there, in shape, and nothing foreign beside it; DataError names the first fault.
        Weights that need neither reshaping nor a cast stay memory-mapped: a sweep's processes share them.
        """
        try:
            config = GPTConfig(**read_config(folder))
        except UserError as e:                      # a shape that cannot be; or already a DataError
            raise e if isinstance(e, DataError) else DataError(f"{folder}/config.json: {e}") from None
        with torch.device("meta"):
            model = cls(config)
        found = read_weights(folder)
        if config.family == "gpt2" and "transformer.wte.weight" not in found:   # the hub's own: no prefix
            found = {k if k.startswith("lm_head.") else "transformer." + k: t for k, t in found.items()}
        constants = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")      # buffers of old writers
        found = {k: t for k, t in found.items() if not k.endswith(constants)}
        state, used = {}, set()
        for ours, (theirs, part) in model.hf_names().items():
            if ours == "head" and config.tied:
                continue
            for leaf, p in model.get_submodule(ours).named_parameters():
                key = f"{theirs}.{leaf}"
                if key not in found:
                    raise DataError(f"{folder}: the weights lack {key}, which a {config.family} model needs")
                t = model.conv1d(ours, found[key])
                whole = (p.size(0) * (3 if part else 1), *p.shape[1:])
                if tuple(t.shape) != whole or not t.is_floating_point():
                    raise DataError(f"{folder}: {key} is {t.dtype} {list(t.shape)}, but config.json asks for "
                                    f"floats of {list(whole)} (out, in)")
                if part:
                    t = t.chunk(3)["qkv".index(part)]
                state[f"{ours}.{leaf}"] = t.to(dtype).contiguous()
                used.add(key)
        if config.tied:
            state["head.weight"] = state["wte.weight"]
            copy = found.get("lm_head.weight")
            if copy is not None and not torch.equal(copy.to(dtype), state["wte.weight"]):
                raise DataError(f"{folder}: config.json ties the head to the embedding, but lm_head.weight "
                                "differs from it; set tie_word_embeddings to false")
            used.add("lm_head.weight")
        if foreign := sorted(set(found) - used):
            raise DataError(f"{folder}: the weights hold {foreign[0]}, which a {config.family} model does "
                            f"not have ({len(foreign)} such tensors)")
        model.load_state_dict(state, assign=True)
        if config.tied:
            model.head.weight = model.wte.weight
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, each atomically, as `transformers` reads them."""
        out = {}
        for ours, (theirs, part) in self.hf_names().items():
            if ours == "head" and self.config.tied:
                continue
            module = self.get_submodule(ours)
            for leaf in ("weight", "bias"):         # by name: adapter parameters beside them stay out
                if getattr(module, leaf, None) is not None:
                    t, key = self.conv1d(ours, getattr(module, leaf).detach()), f"{theirs}.{leaf}"
                    out[key] = torch.cat((out[key], t), -1) if key in out else t    # q, then k, then v
        widest = max((t.dtype for t in out.values()), key=lambda d: d.itemsize)     # loaders round to this
        config = hf_config(self.config, widest)
        back = GPTConfig(**parse_config(config, folder))
        if odd := [f.name for f in fields(back) if getattr(back, f.name) != getattr(self.config, f.name)]:
            raise UserError(f"{folder}: transformers knows no {self.config.family} with this "
                            f"{' '.join(odd)}, so this hybrid has no Hugging Face form")
        write_tensors(os.path.join(folder, "model.safetensors"), {k: t.contiguous() for k, t in out.items()})
        write_json(os.path.join(folder, "config.json"), config)


# ----------------------------------------------------------------------------------- scoring and generation

class LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, tokens, head):
        out, slopes = [], []                            # a slope: d(-log p) / d hidden, of its own row alone
        for h, t in zip(hidden.split(128), tokens.split(128)):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                logits = head(h)                        # (n, V)
            z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
            p, top = z.softmax(-1), z.amax(-1)
            out.append(z.gather(-1, t[:, None])[:, 0] - (top - p.amax(-1).log()))       # z - logsumexp
            p.scatter_add_(-1, t[:, None], p.new_full((len(t), 1), -1.0))
            slopes += torch.autograd.grad(logits, h, p.to(logits.dtype))
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(out)

    @staticmethod
    def backward(ctx, g):
        slopes, = ctx.saved_tensors
        return slopes * -g[:, None].to(slopes.dtype), None, None


def logprob(head, hidden, tokens):
    """log p of one token per row, (N, C), (N,) -> (N,), at least fp32. head: hidden -> logits.

    Logits outweigh the model, so there are never N of them: slices, and under a frozen head a slice leaves
    behind its gradient, made at once, in place of (n, V) numbers that wait for backward.
    """
    if torch.is_grad_enabled() and not head(hidden[:0].detach()).requires_grad:
        return LogProb.apply(hidden, tokens, head)
    some = max(1, len(hidden)) if torch.is_grad_enabled() else 256
    pairs = ((head(h), t) for h, t in zip(hidden.split(some), tokens.split(some)))
    return torch.cat([-F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), t, reduction="none")
                      for z, t in pairs])


def allowed(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V) / temperature (0: the likeliest alone), -inf where top_k, and then top_p, cut."""
    if temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ranked, order = logits.sort(-1, descending=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)     # mass of the likelier tokens
        cut = (before >= top_p).index_fill(-1, order.new_zeros(1), False)   # the likeliest always stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -torch.inf)
    return logits


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One token per row of logits (B, V): temperature (0 is greedy), then top_k, then top_p. Returns (B,).
    Instead of a generator: a number in [0, 1) per row, (B,), at which its cumulative distribution is read."""
    if temperature == 0:
        return logits.argmax(-1)
    p = allowed(logits, temperature, top_k, top_p).softmax(-1)
    if isinstance(generator, torch.Tensor):         # below the total, or rounding could pick a banned last id
        rises, u = p.cumsum(-1), generator[:, None] * (1 - 2 ** -20)                # (B, V), (B, 1)
        return torch.searchsorted(rises, u * rises[:, -1:], right=True)[:, 0]
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def span(columns, ends):
    """The places (2, B, T) of columns (T,) or (B, T) in rows whose prompts, `ends` (B,) long, end in a mask
    and a start token: from there on a token stands where the mask does, and counts what fills it."""
    mask = ends[:, None] - 2
    return torch.stack((torch.minimum(columns, mask), (columns - mask).clamp(min=0)))


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos=None, past=None,
             generator=None, embed=None, both_ways=False, blank=False):
    """Continue prompts of any lengths, as one batch with a KV cache.

    prompts  list of non-empty lists of token ids
    eos      an id, or a collection of ids, that ends a row (and stays in its output); so does a full context
    past     a soft prompt: one entry per layer at batch 1, see the top of this file
    generator    or the dice themselves, (B, max_new_tokens) in [0, 1): then drawn rows are their own, too
    embed    ids (B, T) -> embeddings (B, T, C), where virtual tokens stand inside the prompts
    both_ways    a prompt's tokens see each other both ways, as a prefix-LM has learnt it
    blank    a prompt ends in a mask and a start token: the answer fills the mask, as a GLM has learnt it
    Returns the new tokens only, a list of lists. Greedy rows do not depend on their neighbours; finished rows
    leave the batch, so late steps cost only what still runs. The caller decides .eval() and autocast.
    """
    if not all(prompts):
        raise UserError("generate: a prompt is empty; give it at least one token (end-of-text will do)")
    new = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return new
    if not (temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 <= top_p <= 1)):
        raise UserError(f"generate: temperature {temperature}, top_k {top_k}, top_p {top_p} cannot be; they "
                        "are 0 (greedy) or more, 1 or more, and 0 to 1")
    stop = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    device, sizes = model.wte.weight.device, list(map(len, prompts))
    P = past[0][0].size(2) if past and len(past[0]) != 3 else 0         # virtual tokens in front
    starts = [P + n for n in sizes]                                     # columns used, row by row
    room = [min(max_new_tokens, model.config.block_size - n + 1) for n in starts]   # the last needs no column
    S, caches, last = max(n + max(r, 1) - 1 for n, r in zip(starts, room)), None, [None] * len(prompts)
    for part in micro(range(len(prompts)), sizes, 512 if device.type == "cpu" else 16384):
        n, T = torch.tensor([sizes[i] for i in part], device=device), max(sizes[i] for i in part)
        x = torch.tensor([prompts[i] + [0] * (T - sizes[i]) for i in part], device=device)      # hardly a pad
        hidden, made = model.trunk(embed(x) if embed else x, past, sees=n - int(blank) if both_ways else None,
                                   places=span(torch.arange(T, device=device), n) if blank else None,
                                   at=(torch.arange(len(part), device=device), n - 1))      # (b, C), the last
        caches = caches or [[t.new_zeros(len(prompts), t.size(1), S, t.size(3)) for t in entry[:2]]
                            + list(entry[2:]) for entry in made]
        for t, cache in ((t, c) for entry in zip(made, caches) for t, c in list(zip(*entry))[:2]):
            cache[part, :, :t.size(2)] = t
        for i, h in zip(part, hidden):
            last[i] = h
    alive, lengths, last = list(range(len(prompts))), torch.tensor(starts, device=device), torch.stack(last)
    while True:
        drawn = generator[alive, len(new[alive[0]])] if isinstance(generator, torch.Tensor) else generator
        tokens = sample(model.head(last), temperature, top_k, top_p, drawn)         # (rows alive,)
        for row, token in zip(alive, tokens.tolist()):
            new[row].append(token)
        keep = [i for i, row in enumerate(alive) if new[row][-1] not in stop and len(new[row]) < room[row]]
        if not keep:
            return new
        if len(keep) < len(alive):
            at = torch.tensor(keep, device=device)
            alive, tokens, lengths = [alive[i] for i in keep], tokens[at], lengths[at]
            caches = [[k[at], v[at], *side] for k, v, *side in caches]
        used = max(starts[row] + len(new[row]) for row in alive)        # look no further than the longest row
        view = [(k[:, :, :used], v[:, :, :used], *side) for k, v, *side in caches]
        places = span(lengths[:, None], lengths.new_tensor([starts[row] for row in alive])) if blank else None
        hidden, _ = model.trunk(tokens[:, None], view, lengths, places=places)
        last, lengths = hidden[:, 0], lengths + 1
