"""Casts to FP8 and back: activations by rows, by columns or both at once, weights by blocks, and E5M6.

Each kernel reads its tensor once and each program makes whole tiles, so that amax and cast share the load: the floor is
(bytes in + bytes out) / copy bandwidth. Transposed outputs go through a 128x128 tile in registers; scales of columns
are stored token-major like all others. Legend as in reference.py; `table` as in Groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dryvine.trainer.fp8.kernels.numbers import block_rows, e4m3, inverse_of, magnitude, scale_of, scaled
from dryvine.trainer.fp8.tensors import (
    E5M6,
    TILE,
    Groups,
    Quantized,
    ScaleFormat,
    blocks,
    empty_blocks,
    empty_rows,
    pad,
)

ROWS = 32  # rows a program of the row cast takes: 16 loads of 16 bytes in flight a thread


@triton.jit
def rows_kernel(x, q, s, R, C, x_stride, s_stride, UE8M0: tl.constexpr, ROWS: tl.constexpr):
    b = tl.program_id(0)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = b * 128 + tl.arange(0, 128)
    keep = (r < R)[:, None] & (c < C)[None, :]
    v = tl.load(x + r.to(tl.int64)[:, None] * x_stride + c[None, :], mask=keep, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(magnitude(v), 1), 448.0, UE8M0)
    tl.store(q + r.to(tl.int64)[:, None] * C + c[None, :], e4m3(v, scale[:, None]), mask=keep)
    tl.store(s + b * s_stride + r, scale, mask=r < R)


@triton.jit
def columns_kernel(x, xs, q, s, qt, st, table, R, C, P, xs_stride, s_stride, st_stride, FROM_FP8: tl.constexpr,
                   ROWS_TOO: tl.constexpr, GROUPED: tl.constexpr, UE8M0: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    block = tl.program_id(1)
    first, end = block_rows(block, table, R, GROUPED)
    i = tl.arange(0, 128)
    r = first + i
    c = b * 128 + i
    keep = (r < end)[:, None] & (c < C)[None, :]
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    v = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    if FROM_FP8:
        v = v * tl.load(xs + b * xs_stride + r, mask=r < end, other=0.0)[:, None]
    size = magnitude(v)
    if ROWS_TOO:
        row_scale = scale_of(tl.max(size, 1), 448.0, UE8M0)
        tl.store(q + at, e4m3(v, row_scale[:, None]), mask=keep)
        tl.store(s + b * s_stride + r, row_scale, mask=r < end)
    scale = scale_of(tl.max(size, 0), 448.0, UE8M0)
    turned = tl.trans(e4m3(v, scale[None, :]))
    tl.store(qt + c.to(tl.int64)[:, None] * P + (block * 128 + i)[None, :], turned, mask=(c < C)[:, None])
    tl.store(st + block * st_stride + c, scale, mask=c < C)


@triton.jit
def blocks_kernel(w, q, s, qt, st, R, C, s_batch, s_stride, st_batch, st_stride, UE8M0: tl.constexpr):
    col, row, x = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, 128)
    r = row * 128 + i
    c = col * 128 + i
    keep = (r < R)[:, None] & (c < C)[None, :]
    base = x.to(tl.int64) * R * C
    at = base + r.to(tl.int64)[:, None] * C + c[None, :]
    v = tl.load(w + at, mask=keep, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(magnitude(v), 1), 0)
    scale = scale_of(tl.full((1,), 0.0, tl.float32) + amax, 448.0, UE8M0)
    cast = e4m3(v, scale[:, None])
    tl.store(q + at, cast, mask=keep)
    turned = (c < C)[:, None] & (r < R)[None, :]
    tl.store(qt + base + c.to(tl.int64)[:, None] * R + r[None, :], tl.trans(cast), mask=turned)
    one = tl.arange(0, 1)
    tl.store(s + x * s_batch + row * s_stride + col + one, scale)
    tl.store(st + x * st_batch + col * st_stride + row + one, scale)


@triton.jit
def e5m6_code(y):
    bits = y.to(tl.int32, bitcast=True)
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) & ~0x1FFFF).to(tl.float32, bitcast=True)
    tiny = (tl.abs(y) + 8.0) - 8.0
    tiny = (tiny.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)  # keeps -0
    half = tl.where(tl.abs(y) < 0.00006103515625, tiny, normal).to(tl.float16)
    return (half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) >> 4


@triton.jit
def pack_kernel(x, high, low, s, R, C, s_stride, ROWS: tl.constexpr):
    b = tl.program_id(0)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, 64)
    keep = (r < R)[:, None] & (i < 64)[None, :]
    row = r.to(tl.int64)[:, None]
    at = row * C + b * 128 + i[None, :]
    left = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    right = tl.load(x + at + 64, mask=keep, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(magnitude(left), 1), tl.max(magnitude(right), 1))
    scale = scale_of(amax, 65024.0, True)
    inverse = inverse_of(scale)[:, None]
    left = e5m6_code(scaled(left, inverse, 65024.0))
    right = e5m6_code(scaled(right, inverse, 65024.0))
    tl.store(high + at, (left >> 4).to(tl.uint8), mask=keep)
    tl.store(high + at + 64, (right >> 4).to(tl.uint8), mask=keep)
    tl.store(low + row * (C // 2) + b * 64 + i[None, :], ((left & 15) | ((right & 15) << 4)).to(tl.uint8), mask=keep)
    tl.store(s + b * s_stride + r, scale, mask=r < R)


@triton.jit
def e5m6_value(code):
    return (code << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def unpack_kernel(high, low, s, x, R, C, s_stride, ROWS: tl.constexpr):
    b = tl.program_id(0)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, 64)
    keep = (r < R)[:, None] & (i < 64)[None, :]
    row = r.to(tl.int64)[:, None]
    at = row * C + b * 128 + i[None, :]
    scale = tl.load(s + b * s_stride + r, mask=r < R, other=0.0)[:, None]
    rest = tl.load(low + row * (C // 2) + b * 64 + i[None, :], mask=keep, other=0).to(tl.int32)
    left = tl.load(high + at, mask=keep, other=0).to(tl.int32) << 4
    right = tl.load(high + at + 64, mask=keep, other=0).to(tl.int32) << 4
    dtype = x.dtype.element_ty
    tl.store(x + at, (e5m6_value(left | (rest & 15)) * scale).to(dtype), mask=keep)
    tl.store(x + at + 64, (e5m6_value(right | (rest >> 4)) * scale).to(dtype), mask=keep)


def quantize_rows(x: Tensor, scales: ScaleFormat = "fp32") -> Quantized:
    rows, cols = x.shape
    out = empty_rows(rows, cols, x.device)
    if rows:
        rows_kernel[(blocks(cols), -(-rows // ROWS))](
            x, out.values, out.scales, rows, cols, x.stride(0), out.scales.stride(1), scales == "ue8m0", ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _columns(x: Tensor | Quantized, groups: Groups, scales: ScaleFormat, rows_too: bool) -> tuple[Quantized, Quantized]:
    source, source_scales = (x.values, x.scales) if isinstance(x, Quantized) else (x, x)
    rows, cols = source.shape
    padded = groups.blocks * TILE
    turned = empty_rows(cols, padded, source.device)
    out = empty_rows(rows, cols, source.device) if rows_too else turned
    if groups.blocks:
        columns_kernel[(blocks(cols), groups.blocks)](
            source, source_scales, out.values, out.scales, turned.values, turned.scales, groups.tables[0], rows, cols,
            padded, source_scales.stride(1), out.scales.stride(1), turned.scales.stride(1), isinstance(x, Quantized),
            rows_too, len(groups.counts) > 1, scales == "ue8m0", num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out, turned


def quantize_columns(x: Tensor | Quantized, groups: Groups, scales: ScaleFormat = "fp32") -> Quantized:
    return _columns(x, groups, scales, rows_too=False)[1]


def quantize_both(x: Tensor, groups: Groups, scales: ScaleFormat = "fp32") -> tuple[Quantized, Quantized]:
    return _columns(x, groups, scales, rows_too=True)


def quantize_blocks(w: Tensor, scales: ScaleFormat = "fp32") -> tuple[Quantized, Quantized]:
    rows, cols = w.shape[-2:]
    out, turned = empty_blocks(w.shape, w.device), empty_blocks((*w.shape[:-2], cols, rows), w.device)
    batch = w.shape[0] if w.dim() == 3 else 1
    blocks_kernel[(blocks(cols), blocks(rows), batch)](
        w, out.values, out.scales, turned.values, turned.scales, rows, cols, out.scales.stride(0),
        out.scales.stride(-2), turned.scales.stride(0), turned.scales.stride(-2), scales == "ue8m0", num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out, turned


def pack_e5m6(x: Tensor) -> E5M6:
    rows, cols = x.shape
    high = torch.empty(rows, cols, dtype=torch.uint8, device=x.device)
    low = torch.empty(rows, cols // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(blocks(cols), pad(rows, 4), device=x.device).t()[:rows]
    if rows:
        pack_kernel[(blocks(cols), -(-rows // ROWS))](
            x, high, low, scales, rows, cols, scales.stride(1), ROWS, num_warps=4, enable_fp_fusion=False
        )
    return E5M6(high, low, scales)


def unpack_e5m6(packed: E5M6, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    rows, cols = packed.high.shape
    x = torch.empty(rows, cols, dtype=dtype, device=packed.high.device)
    if rows:
        unpack_kernel[(blocks(cols), -(-rows // ROWS))](
            packed.high, packed.low, packed.scales, x, rows, cols, packed.scales.stride(1), ROWS, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return x
