"""The arithmetic of casts, bitwise reproducible on every machine; kernels/numbers.py has the same for kernels.

Bitwise reproducibility requires that there is no fused multiply-add, that division is correctly rounded, and a sigmoid
made of additions and multiplications only. Agreement "up to rounding" would hide off-by-one-tile errors.

The scale is DeepSeek-V3's (arXiv 2412.19437, section 3.3): amax of the tile at hand, at least 1e-4, divided by 448,
optionally rounded up to a power of two. Legend: R rows, C columns, B blocks of 128.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.trainer.tensors.tiles import AMAX_FLOOR, E4M3_MAX, TILE, ScaleFormat

LOG2E = 1.4426950408889634
WHOLE = 12582912.0  # 1.5 * 2^23: added, it rounds to a whole number and leaves that in the last bits
# 2^f on [-1/2, 1/2], highest power first: a minimax fit, relative error 8e-8 before rounding.
EXP2 = (0.00132764713, 0.00967554096, 0.0555071309, 0.240221202, 0.693146944, 1.00000012)


def scale_of(amax: Tensor, scales: ScaleFormat, top: float = E4M3_MAX) -> Tensor:
    """The scales of tiles with these amax, for a format whose largest number is `top`; infinity if a tile holds a NaN
    or an infinity."""
    scale = amax.nan_to_num(nan=torch.inf, posinf=torch.inf).clamp(min=AMAX_FLOOR) / top
    if scales == "ue8m0":
        # Adding all ones below the exponent carries into it unless the mantissa is zero: round up to a power of two.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)
    return scale


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale; zero in a tile whose scale is infinite."""
    quotient, bad = x * (1.0 / scale), scale.isinf()
    # Bad tiles are so rare that testing for one costs less than an additional pass each time.
    return quotient.masked_fill_(bad, 0.0) if bad.any() else quotient


def tiles_of(x: Tensor) -> Tensor:
    """[R, C] -> FP32 [R, B, 128], the last tile padded with zeros."""
    return filled(x.float(), cols=-x.shape[-1] % TILE).unflatten(-1, (-1, TILE))


def filled(x: Tensor, cols: int = 0, rows: int = 0) -> Tensor:
    """x padded with `cols` zero columns and `rows` zero rows at the end. (`pad` copies even without padding.)"""
    return functional.pad(x, (0, cols, 0, rows)) if cols or rows else x


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) within 3e-7, by steps that round alike on every machine."""
    # e^-x = 2^t, and t = whole + f with f in [-1/2, 1/2].
    t = (x.nan_to_num(nan=0.0) * -LOG2E).clamp(-120.0, 120.0)
    whole = t + WHOLE
    f = t - (whole - WHOLE)
    # 2^f by Horner's rule. FP64 holds a product of two FP32 numbers exactly, so each step rounds once, as an FMA does.
    power, wide = torch.full_like(f, EXP2[0]), f.double()
    for coefficient in torch.tensor(EXP2[1:]).double().tolist():  # as FP32 has them
        power = torch.addcmul(torch.tensor(coefficient, dtype=torch.double), power.double(), wide).float()
    # Times 2^whole: the whole number, in the last bits of `whole`, is added to the exponent.
    power = (power.view(torch.int32) + (whole.view(torch.int32) << 23)).view(torch.float32)
    return 1.0 / (power + 1.0)
