"""Casts fused with what makes their input, as kernels: SwiGLU forward and backward, RMSNorm. fp8/fused.py defines them.

The backward of SwiGLU reads 4 bytes and writes 5 an element of F, and feeds three GEMMs.

Legend: h gate and up [R, 2F], gate first; q values and s scales by rows, qt and st of the transpose; `saved` and ks are
h in FP8, for the backward; r rows, c columns, b block of 128 columns; `table` as in ExpertGroups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dryvine.comm.integers import ceil_div
from dryvine.trainer.fp8.kernels import ptx
from dryvine.trainer.fp8.kernels.numbers import (
    block_rows,
    column_scale,
    e4m3,
    larger,
    magnitude,
    put_rows,
    put_words,
    scale_of,
    sigmoid,
)
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized, empty_rows
from dryvine.trainer.tensors.tiles import TILE, ScaleFormat, blocks

ROWS = 16  # to a program of `swiglu_kernel`


@triton.jit(do_not_specialize=["R", "s_stride", "ks_stride"])
def swiglu_kernel(h, weights, q, s, saved, ks, R, F: tl.constexpr, s_stride, ks_stride, WEIGHTED: tl.constexpr,
                  UE8M0: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """128 columns of gate and the same of up to a program: three tiles a row leave, the product's and both inputs'."""
    b = tl.program_id(0)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = b * 128 + tl.arange(0, 128)
    ours = (r < R)[:, None]
    at = h + r.to(tl.int64)[:, None] * (2 * F) + c[None, :]
    gate = ptx.widen(tl.load(at, mask=ours, other=0.0))
    up = ptx.widen(tl.load(at + F, mask=ours, other=0.0))
    put_rows(saved, ks, gate, r, R, c, 2 * F, b, ks_stride, UE8M0)
    put_rows(saved, ks, up, r, R, c + F, 2 * F, b + F // 128, ks_stride, UE8M0)
    y = gate * sigmoid(gate) * up
    if WEIGHTED:
        y = y * tl.load(weights + r, mask=r < R, other=0.0).to(tl.float32)[:, None]
    put_rows(q, s, y, r, R, c, F, b, s_stride, UE8M0)


@triton.jit
def read_back(saved, ks, r, end, c, b, F2: tl.constexpr, ks_stride):
    """Column b of 1x128 tiles of a tensor of width F2, as FP32 [.., 128]."""
    v = tl.load(saved + r.to(tl.int64)[:, None] * F2 + c[None, :], mask=(r < end)[:, None], other=0.0).to(tl.float32)
    return v * tl.load(ks + b * ks_stride + r, mask=r < end, other=0.0)[:, None]


@triton.jit
def some_rows(dy, saved, ks, weights, dw, r, end, c, b, F: tl.constexpr, ks_stride, WEIGHTED: tl.constexpr,
              FIRST: tl.constexpr):  # fmt: skip
    """-> the product again, d gate and d up of rows r, each FP32 [.., 128]. With FIRST this tile's part of d weights is
    stored too."""
    gate = read_back(saved, ks, r, end, c, b, 2 * F, ks_stride)
    up = read_back(saved, ks, r, end, c + F, b + F // 128, 2 * F, ks_stride)
    d = ptx.widen(tl.load(dy + r.to(tl.int64)[:, None] * F + c[None, :], mask=(r < end)[:, None], other=0.0))
    sig = sigmoid(gate)
    silu = gate * sig
    y = silu * up
    if WEIGHTED:
        weight = tl.load(weights + r, mask=r < end, other=0.0).to(tl.float32)[:, None]
        if FIRST:
            tl.store(dw + r.to(tl.int64) * (F // 128) + b, tl.sum(d * y, 1), mask=r < end)
        y = y * weight
        d = d * weight
    return y, d * up * (sig * (gate * (1.0 - sig) + 1.0)), d * silu


@triton.jit
def some_bytes(dy, saved, ks, weights, dw, r, end, c, b, y_inverse, g_inverse, u_inverse, F: tl.constexpr, ks_stride,
               WEIGHTED: tl.constexpr):  # fmt: skip
    """`some_rows` in E4M3, by scales of columns."""
    y, g, u = some_rows(dy, saved, ks, weights, dw, r, end, c, b, F, ks_stride, WEIGHTED, False)
    return ptx.cast(y * y_inverse, -1), ptx.cast(g * g_inverse, -1), ptx.cast(u * u_inverse, -1)


@triton.jit(do_not_specialize=["R", "ks_stride", "s_stride"])
def swiglu_backward_kernel(dy, saved, ks, weights, q, s, qt, st, act, acts, dw, table, R, F: tl.constexpr, P, ks_stride,
                           s_stride, st_stride, act_stride, WEIGHTED: tl.constexpr, UE8M0: tl.constexpr,
                           WORDS: tl.constexpr):  # fmt: skip
    """A block of 128x128 of one expert's rows to a program. Three tensors of that size leave by columns, whose scales
    need all rows first. Held, they fill the registers of an SM; so a block is computed twice, the second time from L1.
    The first pass is not unrolled: a shorter program, which the instruction cache holds, is 4 to 7% faster."""
    b = tl.program_id(0)
    block = tl.program_id(1)
    first, end = block_rows(block, table, R, True)
    if first >= end:
        return
    c = b * 128 + tl.arange(0, 128)
    # The same columns of the half that belongs to up.
    far, far_b = c + F, b + F // 128
    # Parts of 4 * WORDS rows that this block has.
    filled = tl.minimum(tl.cdiv(end - first, 4 * WORDS), 32 // WORDS)
    # First pass: d gate and d up leave by rows; the largest magnitudes of each column give the scales by columns.
    y_most = tl.zeros((WORDS, 128), tl.float32)
    g_most = tl.zeros((WORDS, 128), tl.int32)
    u_most = g_most
    for part in range(4 * filled):
        r = first + part * WORDS + tl.arange(0, WORDS)
        y, g, u = some_rows(dy, saved, ks, weights, dw, r, end, c, b, F, ks_stride, WEIGHTED, True)
        put_rows(q, s, g, r, end, c, 2 * F, b, s_stride, UE8M0)
        put_rows(q, s, u, r, end, far, 2 * F, far_b, s_stride, UE8M0)
        y_most = larger(y_most, y)
        # Their magnitudes are at hand, from the casts by rows.
        g_most = tl.maximum(g_most, magnitude(g))
        u_most = tl.maximum(u_most, magnitude(u))
    y_inverse, y_sound = column_scale(y_most, acts, block, c, F, act_stride, UE8M0)
    g_inverse, g_sound = column_scale(g_most, st, block, c, 2 * F, st_stride, UE8M0)
    u_inverse, u_sound = column_scale(u_most, st, block, far, 2 * F, st_stride, UE8M0)
    # Second pass: four rows of a column become the four bytes of a word.
    for part in range(filled):
        r = first + part * (4 * WORDS) + 4 * tl.arange(0, WORDS)
        y0, g0, u0 = some_bytes(
            dy, saved, ks, weights, dw, r, end, c, b, y_inverse, g_inverse, u_inverse, F, ks_stride, WEIGHTED
        )
        y1, g1, u1 = some_bytes(
            dy, saved, ks, weights, dw, r + 1, end, c, b, y_inverse, g_inverse, u_inverse, F, ks_stride, WEIGHTED
        )
        y2, g2, u2 = some_bytes(
            dy, saved, ks, weights, dw, r + 2, end, c, b, y_inverse, g_inverse, u_inverse, F, ks_stride, WEIGHTED
        )
        y3, g3, u3 = some_bytes(
            dy, saved, ks, weights, dw, r + 3, end, c, b, y_inverse, g_inverse, u_inverse, F, ks_stride, WEIGHTED
        )
        place = block * 32 + part * WORDS
        put_words(act, ptx.turn(y0, y1, y2, y3), y_sound, place, c, F, P, WORDS)
        put_words(qt, ptx.turn(g0, g1, g2, g3), g_sound, place, c, 2 * F, P, WORDS)
        put_words(qt, ptx.turn(u0, u1, u2, u3), u_sound, place, far, 2 * F, P, WORDS)
    none = tl.zeros((WORDS, 128), tl.int32)
    for part in range(filled, 32 // WORDS):
        place = block * 32 + part * WORDS
        put_words(act, none, y_sound, place, c, F, P, WORDS)
        put_words(qt, none, g_sound, place, c, 2 * F, P, WORDS)
        put_words(qt, none, u_sound, place, far, 2 * F, P, WORDS)


@triton.jit
def rmsnorm_kernel(x, weight, q, s, normed, inverse, R, C, eps, s_stride, UE8M0: tl.constexpr, TILES: tl.constexpr):
    """A row to a program, TILES tiles at least as wide as it."""
    r = tl.program_id(0)
    b = tl.arange(0, TILES)
    c = b[:, None] * 128 + tl.arange(0, 128)[None, :]
    base = r.to(tl.int64) * C
    # Not `ptx.widen`, which hides from the compiler that BF16 to FP64 is one conversion.
    v = tl.load(x + base + c, mask=c < C, other=0.0).to(tl.float32)
    # In FP64, where the order of additions does not reach the FP32 result.
    wide = v.to(tl.float64)
    mean = (tl.sum(tl.sum(wide * wide, 1), 0) / C.to(tl.float64)).to(tl.float32)
    # 1 / sqrt(mean + eps), both steps correctly rounded, as a tensor [1, 1].
    zero = tl.full((1, 1), 0.0, tl.float32)
    inv = tl.div_rn(zero + 1.0, tl.sqrt_rn(zero + (mean + eps)))
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    y = (v * inv * w).to(normed.dtype.element_ty)
    tl.store(normed + base + c, y, mask=c < C)
    # The cast is of the normed row as rounded to its dtype, as a Linear would read it.
    y = y.to(tl.float32)
    scale = scale_of(tl.max(magnitude(y), 1), 448.0, UE8M0)
    tl.store(q + base + c, e4m3(y, scale[:, None]), mask=c < C)
    tl.store(s + b * s_stride + r, scale, mask=b * 128 < C)
    tl.store(inverse + r + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :], inv)


def swiglu_rows(
    gate_up: Tensor, weights: Tensor | None = None, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Quantized]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if width % TILE:
        raise ValueError(f"an FP8 FFN on a GPU has a width that is a multiple of 128, not {width}: pad it")
    out, saved = empty_rows(rows, width, gate_up.device), empty_rows(rows, 2 * width, gate_up.device)
    if rows:
        swiglu_kernel[(blocks(width), ceil_div(rows, ROWS))](
            gate_up, gate_up if weights is None else weights, out.values, out.scales, saved.values, saved.scales, rows,
            width, out.scales.stride(1), saved.scales.stride(1), weights is not None, scales == "ue8m0", ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out, saved


def swiglu_backward(
    dy: Tensor, gate_up: Quantized, weights: Tensor | None, groups: ExpertGroups, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Quantized, Quantized, Tensor]:
    rows, width = dy.shape
    padded = groups.blocks * TILE
    out = empty_rows(rows, 2 * width, dy.device)
    transposed, act = empty_rows(2 * width, padded, dy.device), empty_rows(width, padded, dy.device)
    pieces = torch.zeros(rows, blocks(width), device=dy.device)
    if groups.blocks:
        swiglu_backward_kernel[(blocks(width), groups.blocks)](
            dy, gate_up.values, gate_up.scales, dy if weights is None else weights, out.values, out.scales,
            transposed.values.view(torch.int32), transposed.scales, act.values.view(torch.int32), act.scales, pieces,
            groups.tables.blocks, rows, width, padded, gate_up.scales.stride(1), out.scales.stride(1),
            transposed.scales.stride(1), act.scales.stride(1), weights is not None, scales == "ue8m0", 8,
            num_warps=4, maxnreg=128, enable_fp_fusion=False,
        )  # fmt: skip
    return out, transposed, act, pieces.sum(-1)


def rmsnorm_rows(
    x: Tensor, weight: Tensor, eps: float, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Tensor, Tensor]:
    rows, cols = x.shape
    x, out = x.contiguous(), empty_rows(rows, cols, x.device)
    normed, inverse = torch.empty_like(x), torch.empty(rows, 1, device=x.device)
    if rows:
        rmsnorm_kernel[(rows,)](
            x, weight, out.values, out.scales, normed, inverse, rows, cols, eps, out.scales.stride(1),
            scales == "ue8m0", triton.next_power_of_2(blocks(cols)), num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out, normed, inverse
