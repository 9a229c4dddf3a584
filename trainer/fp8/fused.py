"""Casts fused with the operation that computes their input: SwiGLU forward and backward, RMSNorm. This is the CPU
implementation and the reference for the kernels (kernels/fused.py), which must agree bitwise.

Unfused, a BF16 tensor is written and read again for each: 4 bytes an element in addition to the cast's 1 to 3. The mean
square is summed in FP64, so that the order of additions does not affect the FP32 result.

Legend: R rows, C columns, F width of the FFN, P rows padded by expert to 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dryvine.comm.by_device import kernel_in
from dryvine.trainer.fp8.casts import quantize_both, quantize_columns, quantize_rows
from dryvine.trainer.fp8.numbers import sigmoid
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.tiles import ScaleFormat

KERNELS = "dryvine.trainer.fp8.kernels.fused"


@kernel_in(KERNELS)
def swiglu_rows(
    gate_up: Tensor, weights: Tensor | None = None, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Quantized]:
    """SwiGLU and cast in one pass: [R, 2F] (gate first), row weights [R] -> the product [R, F] and gate_up [R, 2F],
    both in 1x128 tiles. The second is all that is saved for the backward (V3 caches SwiGLU's inputs in FP8)."""
    gate, up = gate_up.float().chunk(2, -1)
    return quantize_rows(_weigh(gate * sigmoid(gate) * up, weights), scales), quantize_rows(gate_up, scales)


@kernel_in(KERNELS)
def swiglu_backward(
    dy: Tensor, gate_up: Quantized, weights: Tensor | None, groups: ExpertGroups, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Quantized, Quantized, Tensor]:
    """dy [R, F] and the saved gate_up -> d gate_up as rows [R, 2F] and as columns [2F, P], the product again as columns
    [F, P], and d weights: FP32 [R], summed over F (the kernel adds in FP32, pieces of 128)."""
    gate, up = gate_up.dequantize().chunk(2, -1)
    s = sigmoid(gate)
    silu, slope = gate * s, s * (gate * (1.0 - s) + 1.0)
    dy, act = dy.float(), silu * up
    dweights = (dy * act).double().sum(-1).float()
    dy = _weigh(dy, weights)
    dh = torch.cat((dy * up * slope, dy * silu), -1)
    return *quantize_both(dh, groups, scales), quantize_columns(_weigh(act, weights), groups, scales), dweights


def _weigh(x: Tensor, weights: Tensor | None) -> Tensor:
    return x if weights is None else x * weights.float().unsqueeze(-1)


@kernel_in(KERNELS)
def rmsnorm_rows(
    x: Tensor, weight: Tensor, eps: float, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Tensor, Tensor]:
    """RMSNorm and cast in one pass: [R, C] -> the normed x as quantised rows and in x's dtype, and 1 / rms, FP32
    [R, 1], for the backward. It is rounded to x's dtype before it is quantised, so that readers of either see the same
    values."""
    square = x.double()
    mean = ((square * square).sum(-1, keepdim=True) / x.shape[-1]).float()
    # By way of FP64, since torch's FP32 sqrt on a CPU is not correctly rounded.
    inverse = 1.0 / (mean + eps).double().sqrt().float()
    normed = (x.float() * inverse * weight.float()).to(x.dtype)
    return quantize_rows(normed, scales), normed, inverse
