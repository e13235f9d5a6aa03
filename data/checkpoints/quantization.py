"""data/checkpoints/quantization.py: frozen weights as 8 or 4 bit codes, dequantised per product.

    w ~ absmax * code     absmax: the largest |w| of a block of 64      bits per weight, absmax in fp32:
    int8    code = k / 127, k = -127 .. 127                             8.5
    nf4     code = one of 16 quantiles of a normal, scaled to [-1, 1]   4.5       two codes per byte
    double  absmax, minus its mean, is int8 in blocks of 256            4.13      (with nf4)

Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3; blocks: Dettmers et al. 2022 (2110.02861). NF4
has 8 positive and 7 negative quantiles and an exact zero, so that padding and pruned weights stay 0.
Deviation: double quantisation uses int8 where the paper uses an 8-bit float.
Quantised weights are never trained: backward computes the gradient of the input only.

Public: QuantizedWeight, QuantProduct, keep_wide, compute_dtype, NF4, QUANT_TYPES
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.runtime.files import UserError

POSITIVE = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])         # (8,)
NEGATIVE = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])        # (7,)
NF4 = torch.cat((NEGATIVE, torch.zeros(1), POSITIVE.flip(0))) / POSITIVE[0]     # (16,), rising
PAIRS = torch.view_as_complex(torch.cartesian_prod(NF4, NF4).float())       # (256,): both values of a byte
QUANT_TYPES = ("int8", "nf4")
QUANT_SOURCES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of the weights
INT8_MAX = 127
MIDPOINTS = ((NF4[1:] + NF4[:-1]) / 2).tolist()                         # (15,), between neighbouring codes


@functools.cache
def _pairs_on(device):
    """PAIRS on a device, copied once: a copy in every product would make a GPU wait for the CPU."""
    return PAIRS.to(device)


def keep_wide(self, fn, recurse=True):
    """nn.Module._apply for tensors that a cast of the model, such as model.bfloat16(), must leave in fp32."""
    def apply_in_fp32(t):
        new = fn(t)
        if not new.is_floating_point():
            return new
        return t.to(new.device, torch.promote_types(new.dtype, torch.float32))
    return nn.Module._apply(self, apply_in_fp32, recurse)


def compute_dtype(x, dtype):
    """The dtype of a product with x: autocast's where it is on, else `dtype`."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


class QuantizedWeight(nn.Module):
    """A weight as codes; calling it with a dtype returns the weight.

    w            the weight, of any shape
    quant_type   "int8" or "nf4"; raises UserError for others
    double       quantise absmax as well
    """
    _apply = keep_wide                          # absmax in bf16 would lose more than the int8 codes do

    def __init__(self, w, quant_type, double=False, block=64):
        super().__init__()
        if quant_type not in QUANT_TYPES:
            raise UserError(f"unknown quantisation {quant_type!r}; known are {', '.join(QUANT_TYPES)}")
        self.shape = w.shape
        self.quant_type = quant_type
        self.first = w.flatten()[0].item()      # part of the fingerprint of an adapter's base
        flat = w.detach().float().flatten()
        blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
        tiny = torch.finfo(torch.float32).tiny                          # a block of zeros is divided by this
        absmax = blocks.abs().amax(1).clamp_min(tiny)                           # (blocks,)
        unit = blocks / absmax[:, None]                                         # (blocks, block), in [-1, 1]
        if quant_type == "int8":
            codes = (unit * INT8_MAX).round().to(torch.int8)                    # (blocks, block)
        else:
            codes = _nearest_nf4(unit)
            codes = codes[:, ::2] * 16 + codes[:, 1::2]                         # (blocks, block / 2)
        self.register_buffer("codes", codes)
        self.register_buffer("mean", absmax.mean() if double else None)
        if double:
            self.absmax = QuantizedWeight(absmax - self.mean, "int8", block=256)
        else:
            self.register_buffer("absmax", absmax)

    def forward(self, dtype):
        """The weight, dequantised."""
        absmax = self.absmax
        if self.mean is not None:
            absmax = (self.absmax(torch.float32) + self.mean).clamp_min(0)
        if self.quant_type == "int8":
            unit = self.codes.float()
            absmax = absmax / INT8_MAX
        else:                                   # a complex number is a pair: one look-up for two codes
            pairs = _pairs_on(self.codes.device).index_select(0, self.codes.flatten().int())
            unit = torch.view_as_real(pairs).view(len(self.codes), -1)
        w = (unit * absmax[:, None]).flatten()
        return w[:self.shape.numel()].view(self.shape).to(dtype)

    def bits(self):
        """Bits of storage, absmax included."""
        return sum(8 * b.numel() * b.element_size() for b in self.buffers())


def _nearest_nf4(unit):
    """The index of the nearest of the 16 codes: the number of midpoints below. uint8, of the same shape."""
    codes = torch.zeros_like(unit, dtype=torch.uint8)
    for midpoint in MIDPOINTS:
        codes += unit > midpoint
    return codes


class QuantProduct(torch.autograd.Function):
    """x W^T + b with a QuantizedWeight.

    Backward dequantises W again; autograd would keep every dense W of the forward alive.
    """

    @staticmethod
    def forward(ctx, x, quant, bias):
        ctx.quant = quant
        return F.linear(x, quant(compute_dtype(x, x.dtype)), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.quant(grad.dtype), None, None         # the codes and the bias are frozen
