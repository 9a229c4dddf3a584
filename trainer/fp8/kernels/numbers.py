"""Device functions shared by the cast kernels: the same steps as fp8/numbers.py, in the same order.

Launch with `enable_fp_fusion=False`: a fused multiply-add rounds once where the definition rounds twice. Where `tl.fma`
is written, the definition has a division or FP64, which round to the same bits.

Legend: v values, s scale; q values and s scales by rows, qt and st of the transpose; r rows, c columns, b block of 128
columns.
"""

import triton
import triton.language as tl


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
    """x / s, zero in a tile whose scale is infinite. Within the format's range without a clamp, since s came from
    the largest |x|, and the hardware cast saturates what rounding adds to that one."""
    return tl.where(s < float("inf"), x * inverse_of(s), 0.0)


@triton.jit
def inverse_of(s):
    """1 / s, correctly rounded, for s from 2^-120 to 2^120: two of Newton's steps from the hardware's approximation,
    the last of which rounds right (Markstein). `div_rn` has a rare case, and with it a branch that keeps divisions
    from being interleaved."""
    # Near 1 / s: the hardware's approximate 1 / sqrt(s), squared.
    y = tl.rsqrt(s)
    y = y * y
    y = tl.fma(tl.fma(-s, y, 1.0), y, y)
    return tl.fma(tl.fma(-s, y, 1.0), y, y)


@triton.jit
def e4m3(x, s):
    """x / s as E4M3; `s` is broadcast against x."""
    return scaled(x, s).to(tl.float8e4nv)


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
    return inverse_of(p + 1.0)


@triton.jit
def put_rows(q, s, v, r, end, c, C, b, s_stride, UE8M0: tl.constexpr):
    """Store v [.., 128] as column b of 1x128 tiles, rows below `end` only."""
    scale = scale_of(tl.max(magnitude(v), 1), 448.0, UE8M0)
    at = q + r.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(at, e4m3(v, scale[:, None]), mask=(r < end)[:, None] & (c < C)[None, :])
    tl.store(s + b * s_stride + r, scale, mask=r < end)


@triton.jit
def byte(v, inverse):
    """v / scale as an E4M3 byte in a uint32, to be shifted into a word."""
    return (v * inverse).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32)


@triton.jit
def column_scale(largest, st, block, c, C, st_stride, UE8M0: tl.constexpr):
    """Scales of 1x128 tiles over rows, from the largest magnitudes [.., 128] of any partition of the 128 rows; stored.
    -> their inverses and whether the tile was sound, each [1, 128]."""
    scale = scale_of(tl.max(largest, 0), 448.0, UE8M0)
    tl.store(st + block * st_stride + c, scale, mask=c < C)
    return inverse_of(scale)[None, :], (scale < float("inf"))[None, :]


@triton.jit
def put_words(qt, words, sound, first, c, C, P, WORDS: tl.constexpr):
    """Store uint32 [WORDS, 128], four rows of a column in each, transposed: `qt` is int32 [C, P / 4], `first` the
    place of the first word in its row."""
    words = tl.where(sound, words, 0).to(tl.int32, bitcast=True)
    at = qt + c.to(tl.int64)[:, None] * (P // 4) + first + tl.arange(0, WORDS)[None, :]
    tl.store(at, tl.trans(words), mask=(c < C)[:, None])


@triton.jit
def put_columns(qt, st, v0, v1, v2, v3, block, c, C, P, st_stride, UE8M0: tl.constexpr):
    """Store 128 rows transposed, as 1x128 tiles over rows: v0 [32, 128] has rows 0, 4, 8, .., v1 rows 1, 5, .. and so
    on, so that four bytes which end up side by side are in one thread."""
    largest = tl.maximum(tl.maximum(magnitude(v0), magnitude(v1)), tl.maximum(magnitude(v2), magnitude(v3)))
    i, sound = column_scale(largest, st, block, c, C, st_stride, UE8M0)
    words = byte(v0, i) | (byte(v1, i) << 8) | (byte(v2, i) << 16) | (byte(v3, i) << 24)
    put_words(qt, words, sound, block * 32, c, C, P, 32)


@triton.jit
def block_rows(block, table, R, GROUPED: tl.constexpr):
    """(first row, end of rows) of a block of 128 rows that belong to one expert; `table` as in ExpertGroups. A block
    that no expert has ends where it begins: it reads nothing, and nobody reads what it writes."""
    if GROUPED:
        return tl.load(table + 3 * block + 1), tl.load(table + 3 * block + 2)
    else:
        return block * 128, R
