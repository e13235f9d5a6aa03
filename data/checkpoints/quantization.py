"""data/checkpoints/quantization.py: frozen weights as 8 or 4 bit codes, multiplied without ever being kept dense.

    w ~ top * code       top: the largest |w| of a block of 64          bits a weight, top in fp32:
    int8    code = k / 127, k = -127 .. 127                             8.5
    nf4     code = one of 16 quantiles of a normal, scaled to [-1, 1]   4.5       two codes to a byte
    double  top itself, less its mean, is int8 in blocks of 256         4.13      (with nf4)

Dettmers et al. 2023 (QLoRA, arXiv 2305.14314) section 3; blocks: Dettmers et al. 2022 (2110.02861). NF4 has 8
positive and 7 negative quantiles and an exact zero, so that padding and pruned weights stay 0.
Deviation: double quantisation uses int8 where the paper uses an 8-bit float.
Trained weights are never here: backward gives the input its gradient, the codes none.

Public: Quantised, QuantProduct, keep_wide, compute_dtype
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

POSITIVE = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])         # (8,)
NEGATIVE = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])        # (7,)
NF4 = torch.cat((NEGATIVE, torch.zeros(1), POSITIVE.flip(0))) / POSITIVE[0]     # (16,), rising
PAIRS = torch.view_as_complex(torch.cartesian_prod(NF4, NF4).float())           # (256,): a byte is two codes


@functools.cache
def pairs_on(device):
    """PAIRS where the codes are: a copy at each product would make a GPU wait for the CPU."""
    return PAIRS.to(device)


def keep_wide(self, fn, recurse=True):
    """nn.Module._apply for tensors that a cast of the model, like model.bfloat16(), must leave in fp32."""
    def wide(t):
        new = fn(t)
        if not new.is_floating_point():
            return new
        return t.to(new.device, torch.promote_types(new.dtype, torch.float32))
    return nn.Module._apply(self, wide, recurse)


def compute_dtype(x, dtype):
    """The dtype to compute in: `dtype`, unless the caller asked for autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


class Quantised(nn.Module):
    """A tensor as codes; calling it with a dtype gives the tensor again."""
    _apply = keep_wide                          # in bf16, `top` would cost more precision than the int8 codes

    def __init__(self, w, kind, double=False, block=64):
        super().__init__()
        self.shape, self.kind, self.first = w.shape, kind, w.flatten()[0].item()
        flat = w.detach().float().flatten()
        flat = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
        top = flat.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)     # (blocks,); of zeros, not 0
        unit = flat / top[:, None]                                              # in [-1, 1]
        if kind == "int8":
            codes = (unit * 127).round().to(torch.int8)
        else:                                           # the nearest of 16: count the midpoints below
            code = sum((unit > between).to(torch.uint8) for between in ((NF4[1:] + NF4[:-1]) / 2).tolist())
            codes = code[:, ::2] * 16 + code[:, 1::2]
        self.register_buffer("codes", codes)                                    # (blocks, block or block / 2)
        self.register_buffer("mean", top.mean() if double else None)
        if double:
            self.top = Quantised(top - self.mean, "int8", block=256)
        else:
            self.register_buffer("top", top)

    def forward(self, dtype):
        top = self.top if self.mean is None else (self.top(torch.float32) + self.mean).clamp_min(0)
        if self.kind == "int8":
            unit, top = self.codes.float(), top / 127
        else:                                   # a complex number is a pair: one look-up for two codes
            pairs = pairs_on(self.codes.device).index_select(0, self.codes.flatten().int())
            unit = torch.view_as_real(pairs).view(len(self.codes), -1)
        return (unit * top[:, None]).flatten()[:self.shape.numel()].view(self.shape).to(dtype)

    def bits(self):
        """Stored bits, everything counted."""
        return sum(8 * b.numel() * b.element_size() for b in self.buffers())


class QuantProduct(torch.autograd.Function):
    """x W^T + b. Backward dequantises again: left to autograd, every dense W of the forward would live on."""

    @staticmethod
    def forward(ctx, x, quant, bias):
        ctx.quant = quant
        return F.linear(x, quant(compute_dtype(x, x.dtype)), bias)

    @staticmethod
    def backward(ctx, g):                       # nothing for the codes and the bias: both are frozen
        return g @ ctx.quant(g.dtype), None, None
