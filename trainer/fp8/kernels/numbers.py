"""Device functions shared by the cast kernels: the same steps as fp8/numbers.py, in the same order.

Launch with `enable_fp_fusion=False`: a fused multiply-add rounds once where the definition rounds twice. Where `tl.fma`
is written, the definition has a division or FP64, which round to the same bits.

Legend: v values, s scale; q values and s scales by rows, qt and st of the transpose; r rows, c columns, b block of 128
columns.
"""

import triton
import triton.language as tl

from dryvine.trainer.fp8.kernels import ptx


@triton.jit
def scale_of(amax, TOP: tl.constexpr, UE8M0: tl.constexpr):
    """The scale of a tile, from the largest `magnitude` in it; infinity if it held a NaN or an infinity."""
    a = tl.maximum(amax.to(tl.float32, bitcast=True), 1e-4)
    s = a * (1.0 / TOP)
    # a / TOP, correctly rounded: the remainder of the product with the rounded 1 / TOP corrects it.
    s = tl.fma(tl.fma(s, -TOP, a), 1.0 / TOP, s)
    if UE8M0:
        # Carries into the exponent unless the mantissa is zero: up to a power of two.
        s = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & ~0x7FFFFF).to(tl.float32, bitcast=True)
    # The bits of infinity, and of NaNs above it.
    return tl.where(amax < 0x7F800000, s, float("inf"))


@triton.jit
def magnitude(x):
    """The bits of |x|, which order as the numbers do, with NaNs above infinity: a float `max` on a GPU drops NaNs."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scaled(x, s):
    """x / s, zero in a tile whose scale is infinite."""
    return tl.where(s < float("inf"), x * ptx.inverse(s), 0.0)


@triton.jit
def e4m3(x, s):
    """x / s as E4M3, zero in a tile whose scale is infinite; `s` is broadcast against x. The largest |x| gave s, so
    that only rounding leaves the format's range, and the cast saturates."""
    return ptx.cast(x * ptx.inverse(s), tl.where(s < float("inf"), -1, 0))


@triton.jit
def larger(most, x):
    """The larger of `most` and |x|, a NaN if either is: one instruction, where the maximum of a `magnitude` is two."""
    return tl.maximum(most, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of(v0, v1, v2, v3):
    """The `larger` of four."""
    return larger(larger(larger(tl.abs(v0), v1), v2), v3)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x). Of a NaN it may be anything: callers multiply with x."""
    # e^-x = 2^t, and t = m + f. Adding 1.5 * 2^23 rounds t to a whole number and leaves that in the last bits.
    t = tl.minimum(tl.maximum(x * -1.4426950408889634, -120.0), 120.0)
    m = t + 12582912.0
    f = t - (m - 12582912.0)
    # 2^f by the polynomial of fp8/numbers.py.
    p = tl.full(f.shape, 0.00132764713, tl.float32)
    p = tl.fma(p, f, 0.00967554096)
    p = tl.fma(p, f, 0.0555071309)
    p = tl.fma(p, f, 0.240221202)
    p = tl.fma(p, f, 0.693146944)
    p = tl.fma(p, f, 1.00000012)
    # Times 2^m: the whole number is added to the exponent.
    p = (p.to(tl.int32, bitcast=True) + (m.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
    return ptx.inverse(p + 1.0)


@triton.jit
def put_rows(q, s, v, r, end, c, C, b, s_stride, UE8M0: tl.constexpr):
    """Store v [.., 128] as column b of 1x128 tiles, rows below `end` only."""
    scale = scale_of(tl.max(magnitude(v), 1), 448.0, UE8M0)
    at = q + r.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(at, e4m3(v, scale[:, None]), mask=(r < end)[:, None] & (c < C)[None, :])
    tl.store(s + b * s_stride + r, scale, mask=r < end)


@triton.jit
def column_scale(largest, st, block, c, C, st_stride, UE8M0: tl.constexpr):
    """Scales of 1x128 tiles over rows, from the `larger` or `magnitude` [.., 128] of parts of the 128 rows; stored.
    -> their inverses and whether the tile was sound, each [1, 128]."""
    scale = scale_of(tl.max(largest.to(tl.int32, bitcast=True), 0), 448.0, UE8M0)
    tl.store(st + block * st_stride + c, scale, mask=c < C)
    return ptx.inverse(scale)[None, :], (scale < float("inf"))[None, :]


@triton.jit
def put_words(qt, words, sound, first, c, C, P, WORDS: tl.constexpr):
    """Store int32 [WORDS, 128], four rows of a column in each, transposed: `qt` is int32 [C, P / 4], `first` the
    place of the first word in its row."""
    words = tl.where(sound, words, 0)
    at = qt + c.to(tl.int64)[:, None] * (P // 4) + first + tl.arange(0, WORDS)[None, :]
    tl.store(at, tl.trans(words), mask=(c < C)[:, None])


@triton.jit
def put_columns(qt, st, v0, v1, v2, v3, block, c, C, P, st_stride, UE8M0: tl.constexpr):
    """Store 128 rows transposed, as 1x128 tiles over rows: v0 [32, 128] has rows 0, 4, 8, .., v1 rows 1, 5, .. and so
    on, so that four bytes which end up side by side are in one thread."""
    i, sound = column_scale(largest_of(v0, v1, v2, v3), st, block, c, C, st_stride, UE8M0)
    put_words(qt, ptx.word(v0 * i, v1 * i, v2 * i, v3 * i), sound, block * 32, c, C, P, 32)


@triton.jit
def block_rows(block, table, R, GROUPED: tl.constexpr):
    """(first row, end of rows) of a block of 128 rows that belong to one expert; `table` as in ExpertGroups. A block
    that no expert has ends where it begins: it reads nothing, and nobody reads what it writes."""
    if GROUPED:
        return tl.load(table + 3 * block + 1), tl.load(table + 3 * block + 2)
    else:
        return block * 128, R
