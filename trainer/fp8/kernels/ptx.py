"""PTX where Triton has no operation for it or takes more instructions, which is what bounds casts. Each function does
elementwise what its docstring says; the interpreter, which runs no PTX, has the same in NumPy
(tests/support/interpreter.py), and `benchmarks/fp8/kernels.py --section check` checks both against the definitions.
"""

import triton
import triton.language as tl

INVERSE = tl.constexpr("""{
.reg .f32 near, minus, rest;
rcp.approx.ftz.f32 near, $1;
neg.f32 minus, near;
fma.rn.f32 rest, $1, minus, 0f3F800000;
fma.rn.f32 $0, rest, near, near;
}""")

WIDEN = tl.constexpr("""{
.reg .b32 first, second;
shl.b32 first, $2, 16;
and.b32 second, $2, 0xffff0000;
mov.b32 $0, first;
mov.b32 $1, second;
}""")

# Neighbours in registers may be of several rows: each byte has a mask of its own, and of equal ones ptxas makes one.
BYTES = tl.constexpr("""{
.reg .b16 low, high;
.reg .b32 all, keep, one;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 all, {low, high};
and.b32 keep, $5, 0xff;
and.b32 one, $6, 0xff00;
or.b32 keep, keep, one;
and.b32 one, $7, 0xff0000;
or.b32 keep, keep, one;
and.b32 one, $8, 0xff000000;
or.b32 keep, keep, one;
and.b32 $0, all, keep;
}""")

WORD = tl.constexpr("""{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}""")

# Bytes 4x4 transposed: pairs of rows are interleaved, then pairs of pairs.
TURN = tl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, $5, 0x5140;
prmt.b32 b, $4, $5, 0x7362;
prmt.b32 c, $6, $7, 0x5140;
prmt.b32 d, $6, $7, 0x7362;
prmt.b32 $0, a, c, 0x5410;
prmt.b32 $1, a, c, 0x7632;
prmt.b32 $2, b, d, 0x5410;
prmt.b32 $3, b, d, 0x7632;
}""")


@triton.jit
def inverse(s):
    """1 / s, correctly rounded, for s from 2^-120 to 2^120: one of Newton's steps from the hardware's approximation,
    as CUDA's own reciprocal takes it there, without its branch for other s."""
    return tl.inline_asm_elementwise(INVERSE, "=f,f", [s], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def widen(x):
    """x as FP32."""
    if x.dtype == tl.bfloat16:
        bits = tl.inline_asm_elementwise(WIDEN, "=r,=r,r", [x], dtype=tl.int32, is_pure=True, pack=2)
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def cast(v, keep):
    """FP32 v as E4M3, saturated; zero where int32 `keep` is 0 and not -1."""
    made = tl.inline_asm_elementwise(
        BYTES, "=r,f,f,f,f,r,r,r,r", [v, keep], dtype=tl.uint8, is_pure=True, pack=4
    )  # fmt: skip
    return made.to(tl.float8e4nv, bitcast=True)


@triton.jit
def word(v0, v1, v2, v3):
    """Four FP32 values as E4M3, saturated, in an int32, the first in its lowest byte."""
    return tl.inline_asm_elementwise(WORD, "=r,f,f,f,f", [v0, v1, v2, v3], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def turn(b0, b1, b2, b3):
    """Four bytes in an int32, the first in its lowest byte."""
    return tl.inline_asm_elementwise(
        TURN, "=&r,=&r,=&r,=&r,r,r,r,r", [b0, b1, b2, b3], dtype=tl.int32, is_pure=True, pack=4
    )  # fmt: skip
