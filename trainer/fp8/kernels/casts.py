"""The casts of fp8/casts.py as kernels: activations by rows, by columns or both at once, weights by blocks, and E5M6.

Each kernel reads its tensor once and each program makes whole tiles, so that amax and cast share the load: the least
time is (bytes in + bytes out) / copy bandwidth. Transposed outputs go through a 128x128 tile in registers; scales of
columns are stored token-major like all others. A kernel for amax and one for the cast would read everything twice.

Legend: x [R, C]; q values and s scales by rows, qt and st of the transpose; r rows, c columns, b block of 128 columns;
P rows padded by expert to 128; `table` as in ExpertGroups.
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
    larger,
    largest_of,
    magnitude,
    put_columns,
    put_rows,
    put_words,
    scale_of,
    scaled,
)
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import (
    E5M6,
    BothWays,
    Quantized,
    empty_both_ways,
    empty_rows,
    empty_scales,
    empty_transposed,
)
from dryvine.trainer.tensors.tiles import TILE, ScaleFormat, blocks

# Rows to a program of the row cast: each thread has 16 loads of 16 bytes in flight.
ROWS = 32
# Words of four rows each that a program of the transpose takes at a time.
TRANSPOSE_WORDS = 16


@triton.jit(do_not_specialize=["R", "s_stride"])
def rows_kernel(x, q, s, R, C, x_stride, s_stride, UE8M0: tl.constexpr, ROWS: tl.constexpr):
    """ROWS tiles of 1x128 to a program."""
    b = tl.program_id(0)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = b * 128 + tl.arange(0, 128)
    keep = (r < R)[:, None] & (c < C)[None, :]
    v = ptx.widen(tl.load(x + r.to(tl.int64)[:, None] * x_stride + c[None, :], mask=keep, other=0.0))
    put_rows(q, s, v, r, R, c, C, b, s_stride, UE8M0)


@triton.jit
def fourth(x, first, end, c, C):
    """Rows first, first + 4, .. of a block of 128, FP32 [32, 128], zeros beyond `end`."""
    r = first + 4 * tl.arange(0, 32)
    keep = (r < end)[:, None] & (c < C)[None, :]
    return ptx.widen(tl.load(x + r.to(tl.int64)[:, None] * C + c[None, :], mask=keep, other=0.0)), r


@triton.jit(do_not_specialize=["R", "s_stride"])
def columns_kernel(x, q, s, qt, st, table, R, C, P, s_stride, st_stride, ROWS_TOO: tl.constexpr, GROUPED: tl.constexpr,
                   UE8M0: tl.constexpr):  # fmt: skip
    """A block of 128x128 of one expert's rows to a program: by columns, and with ROWS_TOO by rows from one load."""
    b = tl.program_id(0)
    block = tl.program_id(1)
    first, end = block_rows(block, table, R, GROUPED)
    if first >= end:
        return
    c = b * 128 + tl.arange(0, 128)
    # Every fourth row in one tensor, so that four bytes that end up side by side are in one thread.
    v0, r = fourth(x, first, end, c, C)
    v1, _ = fourth(x, first + 1, end, c, C)
    v2, _ = fourth(x, first + 2, end, c, C)
    v3, _ = fourth(x, first + 3, end, c, C)
    if ROWS_TOO:
        put_rows(q, s, v0, r, end, c, C, b, s_stride, UE8M0)
        put_rows(q, s, v1, r + 1, end, c, C, b, s_stride, UE8M0)
        put_rows(q, s, v2, r + 2, end, c, C, b, s_stride, UE8M0)
        put_rows(q, s, v3, r + 3, end, c, C, b, s_stride, UE8M0)
    put_columns(qt, st, v0, v1, v2, v3, block, c, C, P, st_stride, UE8M0)


@triton.jit
def some_rows(x, xs, r, end, c, C: tl.constexpr, b, xs_stride):
    """Those rows of FP8 tiles, read back to FP32, zeros beyond `end`."""
    keep = (r < end)[:, None] & (c < C)[None, :]
    v = tl.load(x + r.to(tl.int64)[:, None] * C + c[None, :], mask=keep, other=0.0).to(tl.float32)
    return v * tl.load(xs + b * xs_stride + r, mask=r < end, other=0.0)[:, None]


@triton.jit(do_not_specialize=["R", "xs_stride"])
def transpose_kernel(x, xs, qt, st, table, R, C: tl.constexpr, P, xs_stride, st_stride, GROUPED: tl.constexpr,
                     UE8M0: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """FP8 by rows to FP8 by columns. The 16 KiB of a block are read a second time, from L1, once their scales are
    known: holding them as FP32 takes registers that are worth more as threads, which hide the first read."""
    b = tl.program_id(0)
    block = tl.program_id(1)
    first, end = block_rows(block, table, R, GROUPED)
    c = b * 128 + tl.arange(0, 128)
    r = first + 4 * tl.arange(0, WORDS)
    # First pass: the largest magnitude of each column, and from it the scales.
    largest = tl.zeros((WORDS, 128), tl.float32)
    for i in tl.static_range(128 // WORDS):
        v = some_rows(x, xs, r + i // 4 * (4 * WORDS) + i % 4, end, c, C, b, xs_stride)
        largest = larger(largest, v)
    inverse, sound = column_scale(largest, st, block, c, C, st_stride, UE8M0)
    # Second pass: four rows of a column become the four bytes of a word.
    for part in tl.static_range(32 // WORDS):
        at = r + part * (4 * WORDS)
        v0 = some_rows(x, xs, at, end, c, C, b, xs_stride) * inverse
        v1 = some_rows(x, xs, at + 1, end, c, C, b, xs_stride) * inverse
        v2 = some_rows(x, xs, at + 2, end, c, C, b, xs_stride) * inverse
        v3 = some_rows(x, xs, at + 3, end, c, C, b, xs_stride) * inverse
        put_words(qt, ptx.word(v0, v1, v2, v3), sound, block * 32 + part * WORDS, c, C, P, WORDS)


@triton.jit
def put_values(q, v, inverse, keep, r, end, c, C):
    """Store v / scale as E4M3, zero where the tile had a fault and `keep` is 0."""
    value = ptx.cast(v * inverse, keep)
    tl.store(q + r.to(tl.int64)[:, None] * C + c[None, :], value, mask=(r < end)[:, None] & (c < C)[None, :])


@triton.jit
def put_transposed(qt, four, x, row, R, c, C):
    """Store a block of the transpose of matrix x from int32 [32, 128]: four rows of a column in a word, and words of a
    column side by side."""
    p = row * 32 + tl.arange(0, 32)
    at = qt + x.to(tl.int64) * C * (R // 4) + c.to(tl.int64)[:, None] * (R // 4) + p[None, :]
    tl.store(at, tl.trans(four), mask=(c < C)[:, None] & (4 * p < R)[None, :])


@triton.jit
def fourth_bytes(q, first, R, c, C):
    """Bytes of rows first, first + 4, .. of a block of 128, uint32 [32, 128], zeros beyond R."""
    r = first + 4 * tl.arange(0, 32)
    keep = (r < R)[:, None] & (c < C)[None, :]
    return tl.load(q + r.to(tl.int64)[:, None] * C + c[None, :], mask=keep, other=0).to(tl.uint32)


@triton.jit
def transpose_blocks_kernel(q, s, qt, st, R, C, s_batch, s_stride, st_batch, st_stride):
    """A block of 128x128 of matrix x to a program: bytes and scale, as `blocks_kernel` leaves them transposed."""
    col, row, x = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = col * 128 + tl.arange(0, 128)
    q += x.to(tl.int64) * R * C
    four = fourth_bytes(q, row * 128, R, c, C) | (fourth_bytes(q, row * 128 + 1, R, c, C) << 8)
    four |= fourth_bytes(q, row * 128 + 2, R, c, C) << 16
    four |= fourth_bytes(q, row * 128 + 3, R, c, C) << 24
    put_transposed(qt, four.to(tl.int32, bitcast=True), x, row, R, c, C)
    tl.store(st + x * st_batch + col * st_stride + row, tl.load(s + x * s_batch + row * s_stride + col))


@triton.jit
def blocks_kernel(w, q, s, qt, st, R, C, s_batch, s_stride, st_batch, st_stride, UE8M0: tl.constexpr):
    """A block of 128x128 of matrix x of w to a program, and its transpose. `qt` is int32 [X, C, R / 4]: the transpose
    leaves as words, as in `put_columns`. (As bytes, Triton 3.6 stores half of them wrong where R is not a multiple of
    16.)"""
    col, row, x = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = col * 128 + tl.arange(0, 128)
    w += x.to(tl.int64) * R * C
    q += x.to(tl.int64) * R * C
    v0, r = fourth(w, row * 128, R, c, C)
    v1, _ = fourth(w, row * 128 + 1, R, c, C)
    v2, _ = fourth(w, row * 128 + 2, R, c, C)
    v3, _ = fourth(w, row * 128 + 3, R, c, C)
    # One scale for the block, as a tensor [1, 1] that broadcasts.
    largest = tl.max(tl.max(largest_of(v0, v1, v2, v3).to(tl.int32, bitcast=True), 1), 0)
    scale = scale_of(tl.full((1, 1), 0, tl.int32) + largest, 448.0, UE8M0)
    inverse, keep = ptx.inverse(scale), tl.where(scale < float("inf"), -1, 0)
    put_values(q, v0, inverse, keep, r, R, c, C)
    put_values(q, v1, inverse, keep, r + 1, R, c, C)
    put_values(q, v2, inverse, keep, r + 2, R, c, C)
    put_values(q, v3, inverse, keep, r + 3, R, c, C)
    four = ptx.word(v0 * inverse, v1 * inverse, v2 * inverse, v3 * inverse)
    put_transposed(qt, four & keep, x, row, R, c, C)
    # Both copies have the same scales, at mirrored places.
    one = tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :]
    tl.store(s + x * s_batch + row * s_stride + col + one, scale)
    tl.store(st + x * st_batch + col * st_stride + row + one, scale)


@triton.jit
def e5m6_code(y):
    """`_e5m6` of fp8/casts.py."""
    bits = y.to(tl.int32, bitcast=True)
    # To nearest even at six bits of mantissa: 23 - 6 = 17 bits go.
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) & ~0x1FFFF).to(tl.float32, bitcast=True)
    # Below 2^-14 steps are 2^-20, the step of 8 in FP32. The sign is put back, since -0 + 8 - 8 is +0.
    tiny = (tl.abs(y) + 8.0) - 8.0
    tiny = (tiny.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    half = tl.where(tl.abs(y) < 0.00006103515625, tiny, normal).to(tl.float16)
    return (half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) >> 4


@triton.jit(do_not_specialize=["R", "s_stride"])
def pack_kernel(x, high, low, s, R, C, s_stride, ROWS: tl.constexpr):
    """ROWS tiles of 1x128 to a program, in halves of 64 columns whose low bits share bytes."""
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
    # Of the 12 bits of each, eight go to `high`, and four to a nibble of `low`.
    left = e5m6_code(scaled(left, scale[:, None]))
    right = e5m6_code(scaled(right, scale[:, None]))
    tl.store(high + at, (left >> 4).to(tl.uint8), mask=keep)
    tl.store(high + at + 64, (right >> 4).to(tl.uint8), mask=keep)
    tl.store(low + row * (C // 2) + b * 64 + i[None, :], ((left & 15) | ((right & 15) << 4)).to(tl.uint8), mask=keep)
    tl.store(s + b * s_stride + r, scale, mask=r < R)


@triton.jit
def e5m6_value(code):
    """12 bits -> FP32: FP16 with four zeros behind."""
    return (code << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["R", "s_stride"])
def unpack_kernel(high, low, s, x, R, C, s_stride, ROWS: tl.constexpr):
    """`pack_kernel` backwards."""
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
        rows_kernel[(blocks(cols), ceil_div(rows, ROWS))](
            x, out.values, out.scales, rows, cols, x.stride(0), out.scales.stride(1), scales == "ue8m0", ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _columns(x: Tensor, groups: ExpertGroups, scales: ScaleFormat, rows_too: bool) -> tuple[Quantized, Quantized]:
    rows, cols = x.shape
    padded = groups.blocks * TILE
    columns = empty_rows(cols, padded, x.device)
    out = empty_rows(rows, cols, x.device) if rows_too else columns
    if groups.blocks:
        columns_kernel[(blocks(cols), groups.blocks)](
            x, out.values, out.scales, columns.values.view(torch.int32), columns.scales, groups.tables.blocks, rows,
            cols, padded, out.scales.stride(1), columns.scales.stride(1), rows_too, len(groups.counts) > 1,
            scales == "ue8m0", num_warps=8, maxnreg=128 if rows_too else 80, enable_fp_fusion=False,
        )  # fmt: skip
    return out, columns


def _transpose(x: Quantized, groups: ExpertGroups, scales: ScaleFormat) -> Quantized:
    rows, cols = x.values.shape
    padded = groups.blocks * TILE
    columns = empty_rows(cols, padded, x.values.device)
    if groups.blocks:
        transpose_kernel[(blocks(cols), groups.blocks)](
            x.values, x.scales, columns.values.view(torch.int32), columns.scales, groups.tables.blocks, rows, cols,
            padded, x.scales.stride(1), columns.scales.stride(1), len(groups.counts) > 1, scales == "ue8m0",
            TRANSPOSE_WORDS, num_warps=4, maxnreg=96, enable_fp_fusion=False,
        )  # fmt: skip
    return columns


def quantize_columns(x: Tensor | Quantized, groups: ExpertGroups, scales: ScaleFormat = "fp32") -> Quantized:
    if isinstance(x, Quantized):
        return _transpose(x, groups, scales)
    return _columns(x, groups, scales, rows_too=False)[1]


def quantize_both(x: Tensor, groups: ExpertGroups, scales: ScaleFormat = "fp32") -> tuple[Quantized, Quantized]:
    return _columns(x, groups, scales, rows_too=True)


def quantize_blocks(w: Tensor, scales: ScaleFormat = "fp32", out: BothWays | None = None) -> BothWays:
    rows, cols = w.shape[-2:]
    if rows % 16 or cols % 16:
        raise ValueError(f"FP8 weights on a GPU have sizes that are multiples of 16, not {rows} x {cols}: pad them")
    plain, transposed = out or empty_both_ways(w)
    batch = w.shape[0] if w.dim() == 3 else 1
    blocks_kernel[(blocks(cols), blocks(rows), batch)](
        w, plain.values, plain.scales, transposed.values.view(torch.int32), transposed.scales, rows, cols,
        plain.scales.stride(0), plain.scales.stride(-2), transposed.scales.stride(0), transposed.scales.stride(-2),
        scales == "ue8m0", num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return BothWays(plain, transposed)


def transpose_blocks(w: Quantized) -> Quantized:
    out, (rows, cols) = empty_transposed(w.values), w.values.shape[-2:]
    batch = w.values.shape[0] if w.values.dim() == 3 else 1
    transpose_blocks_kernel[(blocks(cols), blocks(rows), batch)](
        w.values.view(torch.uint8), w.scales, out.values.view(torch.int32), out.scales, rows, cols, w.scales.stride(0),
        w.scales.stride(-2), out.scales.stride(0), out.scales.stride(-2), num_warps=8,
    )  # fmt: skip
    return out


def pack_e5m6(x: Tensor) -> E5M6:
    rows, cols = x.shape
    if cols % TILE:
        raise ValueError(f"E5M6 on a GPU packs whole tiles of 128, not {cols}: set fp8.cache_after_attention = 'fp8'")
    high = torch.empty(rows, cols, dtype=torch.uint8, device=x.device)
    low = torch.empty(rows, cols // 2, dtype=torch.uint8, device=x.device)
    scales = empty_scales(rows, cols, x.device)
    if rows:
        pack_kernel[(blocks(cols), ceil_div(rows, ROWS))](
            x, high, low, scales, rows, cols, scales.stride(1), ROWS, num_warps=4, enable_fp_fusion=False
        )
    return E5M6(high, low, scales)


def unpack_e5m6(packed: E5M6, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    rows, cols = packed.high.shape
    x = torch.empty(rows, cols, dtype=dtype, device=packed.high.device)
    if rows:
        unpack_kernel[(blocks(cols), ceil_div(rows, ROWS))](
            packed.high, packed.low, packed.scales, x, rows, cols, packed.scales.stride(1), ROWS, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return x
