"""Device functions shared by the cast kernels: the same steps as reference.py, in the same order.

Launch with `enable_fp_fusion=False`: a fused multiply-add rounds once where the reference rounds twice.
Legend: `s` scale, `y` values within the format's range.
"""

import triton
import triton.language as tl


@triton.jit
def scale_of(amax, TOP: tl.constexpr, UE8M0: tl.constexpr):
    """amax is infinite if the tile held a NaN or an infinity."""
    s = tl.div_rn(tl.maximum(amax, 1e-4), tl.full(amax.shape, TOP, tl.float32))
    if UE8M0:
        s = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & ~0x7FFFFF).to(tl.float32, bitcast=True)
    return s


@triton.jit
def magnitude(x):
    """|x|, a NaN as infinity: `max` on a GPU drops NaNs."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def scaled(x, inverse, TOP: tl.constexpr):
    y = x * inverse
    y = tl.where(y == y, y, 0.0)
    return tl.minimum(tl.maximum(y, -TOP), TOP)


@triton.jit
def inverse_of(s):
    return tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)


@triton.jit
def e4m3(x, s):
    """x / s as E4M3; `s` is broadcast against x."""
    return scaled(x, inverse_of(s), 448.0).to(tl.float8e4nv)


@triton.jit
def sigmoid(x):
    t = tl.where(x == x, x, 0.0) * -1.4426950408889634
    t = tl.minimum(tl.maximum(t, -126.0), 126.0)
    n = tl.floor(t + 0.5)
    f = t - n
    p = tl.full(f.shape, 0.00132764713, tl.float32)
    p = p * f + 0.00967554096
    p = p * f + 0.0555071309
    p = p * f + 0.240221202
    p = p * f + 0.693146944
    p = p * f + 1.00000012
    p = (p.to(tl.int32, bitcast=True) + (n.to(tl.int32) << 23)).to(tl.float32, bitcast=True)
    return inverse_of(p + 1.0)


@triton.jit
def block_rows(block, table, R, GROUPED: tl.constexpr):
    """(first row, end of rows) of a block of 128 rows that belong to one expert; `table` as in Groups."""
    if GROUPED:
        return tl.load(table + 3 * block + 1), tl.load(table + 3 * block + 2)
    else:
        return block * 128, R
