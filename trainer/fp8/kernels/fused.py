"""Casts fused with what makes their input: SwiGLU forward and backward, RMSNorm. Definitions are in reference.py.

Unfused, a BF16 tensor is written and read again for each: 4 bytes an element against the cast's 1 to 3. The backward of
SwiGLU reads 4 bytes and writes 5 an element of F, and feeds three GEMMs. Legend as in reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dryvine.trainer.fp8.kernels.numbers import block_rows, e4m3, inverse_of, magnitude, scale_of, sigmoid
from dryvine.trainer.fp8.tensors import TILE, Groups, Quantized, ScaleFormat, blocks, empty_rows

ROWS = 16


@triton.jit
def put_rows(q, s, v, r, end, c, C, b, s_stride, UE8M0: tl.constexpr):
    """Store v [.., 128] as one column of 1x128 tiles, number b."""
    scale = scale_of(tl.max(magnitude(v), 1), 448.0, UE8M0)
    tl.store(q + r.to(tl.int64)[:, None] * C + c[None, :], e4m3(v, scale[:, None]), mask=(r < end)[:, None])
    tl.store(s + b * s_stride + r, scale, mask=r < end)


@triton.jit
def put_columns(qt, st, v, block, c, P, st_stride, UE8M0: tl.constexpr):
    """Store v [128, 128] turned round, as 1x128 tiles over rows."""
    scale = scale_of(tl.max(magnitude(v), 0), 448.0, UE8M0)
    p = block * 128 + tl.arange(0, 128)
    tl.store(qt + c.to(tl.int64)[:, None] * P + p[None, :], tl.trans(e4m3(v, scale[None, :])))
    tl.store(st + block * st_stride + c, scale)


@triton.jit
def swiglu_kernel(h, weights, q, s, kept, ks, R, F, s_stride, ks_stride, WEIGHTED: tl.constexpr, UE8M0: tl.constexpr,
                  ROWS: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = b * 128 + tl.arange(0, 128)
    ours = (r < R)[:, None]
    at = h + r.to(tl.int64)[:, None] * (2 * F) + c[None, :]
    gate = tl.load(at, mask=ours, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=ours, other=0.0).to(tl.float32)
    put_rows(kept, ks, gate, r, R, c, 2 * F, b, ks_stride, UE8M0)
    put_rows(kept, ks, up, r, R, c + F, 2 * F, b + F // 128, ks_stride, UE8M0)
    y = gate * sigmoid(gate) * up
    if WEIGHTED:
        y = y * tl.load(weights + r, mask=r < R, other=0.0).to(tl.float32)[:, None]
    put_rows(q, s, y, r, R, c, F, b, s_stride, UE8M0)


@triton.jit
def swiglu_backward_kernel(dy, kept, ks, weights, q, s, qt, st, act, acts, dw, table, R, F, P, ks_stride, s_stride,
                           st_stride, act_stride, WEIGHTED: tl.constexpr, UE8M0: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    block = tl.program_id(1)
    first, end = block_rows(block, table, R, True)
    i = tl.arange(0, 128)
    r = first + i
    c = b * 128 + i
    ours = (r < end)[:, None]
    row = r.to(tl.int64)[:, None]
    at = kept + row * (2 * F) + c[None, :]
    at_scale = ks + b * ks_stride + r
    gate = tl.load(at, mask=ours, other=0.0).to(tl.float32) * tl.load(at_scale, mask=r < end, other=0.0)[:, None]
    sig = sigmoid(gate)
    silu = gate * sig
    slope = sig * (gate * (1.0 - sig) + 1.0)
    at_scale += (F // 128) * ks_stride
    up = tl.load(at + F, mask=ours, other=0.0).to(tl.float32) * tl.load(at_scale, mask=r < end, other=0.0)[:, None]
    d = tl.load(dy + row * F + c[None, :], mask=ours, other=0.0).to(tl.float32)
    y = silu * up
    if WEIGHTED:
        weight = tl.load(weights + r, mask=r < end, other=0.0).to(tl.float32)[:, None]
        tl.store(dw + r.to(tl.int64) * (F // 128) + b, tl.sum((d * y).to(tl.float64), 1), mask=r < end)
        y = y * weight
        d = d * weight
    put_columns(act, acts, y, block, c, P, act_stride, UE8M0)
    dgate = d * up * slope
    put_rows(q, s, dgate, r, end, c, 2 * F, b, s_stride, UE8M0)
    put_columns(qt, st, dgate, block, c, P, st_stride, UE8M0)
    dup = d * silu
    put_rows(q, s, dup, r, end, c + F, 2 * F, b + F // 128, s_stride, UE8M0)
    put_columns(qt, st, dup, block, c + F, P, st_stride, UE8M0)


@triton.jit
def rmsnorm_kernel(x, weight, q, s, normed, inverse, R, C, eps, s_stride, UE8M0: tl.constexpr, TILES: tl.constexpr):
    r = tl.program_id(0)
    b = tl.arange(0, TILES)
    c = b[:, None] * 128 + tl.arange(0, 128)[None, :]
    base = r.to(tl.int64) * C
    v = tl.load(x + base + c, mask=c < C, other=0.0).to(tl.float32)
    wide = v.to(tl.float64)
    mean = (tl.sum(tl.sum(wide * wide, 1), 0) / C.to(tl.float64)).to(tl.float32)
    one = tl.full((1, 1), 0.0, tl.float32)
    inv = inverse_of(tl.sqrt_rn(one + (mean + eps)))
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    y = (v * inv * w).to(normed.dtype.element_ty)
    tl.store(normed + base + c, y, mask=c < C)
    y = y.to(tl.float32)
    scale = scale_of(tl.max(magnitude(y), 1), 448.0, UE8M0)
    tl.store(q + base + c, e4m3(y, scale[:, None]), mask=c < C)
    tl.store(s + b * s_stride + r, scale, mask=b * 128 < C)
    tl.store(inverse + r + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :], inv)


def swiglu_rows(
    gate_up: Tensor, weights: Tensor | None = None, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Quantized]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out, kept = empty_rows(rows, width, gate_up.device), empty_rows(rows, 2 * width, gate_up.device)
    if rows:
        swiglu_kernel[(blocks(width), -(-rows // ROWS))](
            gate_up, gate_up if weights is None else weights, out.values, out.scales, kept.values, kept.scales, rows,
            width, out.scales.stride(1), kept.scales.stride(1), weights is not None, scales == "ue8m0", ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out, kept


def swiglu_backward(
    dy: Tensor, kept: Quantized, weights: Tensor | None, groups: Groups, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Quantized, Quantized, Tensor]:
    rows, width = dy.shape
    padded = groups.blocks * TILE
    out = empty_rows(rows, 2 * width, dy.device)
    turned, act = empty_rows(2 * width, padded, dy.device), empty_rows(width, padded, dy.device)
    pieces = torch.zeros(rows, blocks(width), dtype=torch.float64, device=dy.device)
    if groups.blocks:
        swiglu_backward_kernel[(blocks(width), groups.blocks)](
            dy, kept.values, kept.scales, dy if weights is None else weights, out.values, out.scales, turned.values,
            turned.scales, act.values, act.scales, pieces, groups.tables[0], rows, width, padded, kept.scales.stride(1),
            out.scales.stride(1), turned.scales.stride(1), act.scales.stride(1), weights is not None,
            scales == "ue8m0", num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
    return out, turned, act, pieces.sum(-1).float()


def rmsnorm_rows(
    x: Tensor, weight: Tensor, eps: float, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Tensor, Tensor]:
    rows, cols = x.shape
    out, normed = empty_rows(rows, cols, x.device), torch.empty_like(x)
    inverse = torch.empty(rows, 1, device=x.device)
    if rows:
        rmsnorm_kernel[(rows,)](
            x, weight, out.values, out.scales, normed, inverse, rows, cols, eps, out.scales.stride(1),
            scales == "ue8m0", triton.next_power_of_2(blocks(cols)), num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out, normed, inverse
