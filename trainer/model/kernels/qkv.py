"""`model/qkv.py` on a GPU: heads are assembled and rotated in one kernel, and their gradients taken apart in another.

Forward, q's rope part is rotated where it lies and only k is written anew. Backward, one program takes all heads of a
token, so that the shared rope key's gradient is summed over heads in FP32, in one order, and rotated back and rounded
once. Incoming gradients are not overwritten: autograd may hand them to other readers too. Bytes moved for a token and
head in BF16: forward 2 (2 rope + 2 nope + rope), backward 2 (3 D + nope + 2 V), D = nope + rope.

Legend as in model/qkv.py; a pair's members are `a`, the first, and `b`.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dryvine.comm.integers import ceil_div
from dryvine.trainer.tensors.context import Context

# Heads a program takes at a time: 16 to 64 bytes of each tensor for a thread.
FORWARD, BACKWARD = 32, 16


@triton.jit
def angles(cos, sin, t, p, PAIRS: tl.constexpr):
    """Cosines and sines of position t: each [1, P]."""
    return (
        tl.load(cos + t * PAIRS + p, mask=p < PAIRS, other=0.0)[None, :],
        tl.load(sin + t * PAIRS + p, mask=p < PAIRS, other=0.0)[None, :],
    )


@triton.jit
def load_pairs(x, keep):
    """Neighbours x [.., 2 P] -> a, b, each FP32 [.., P]: one wide load, split in registers."""
    v = tl.load(x, mask=keep, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(v, [v.shape[0], v.shape[1] // 2, 2]))


@triton.jit
def heads_kernel(q, kv, k_rope, cos, sin, k, T, q_stride, kv_stride, k_rope_stride, A: tl.constexpr, NOPE: tl.constexpr,
                 PAIRS: tl.constexpr, V: tl.constexpr, NOPE2: tl.constexpr, PAIRS2: tl.constexpr,
                 HEADS: tl.constexpr):  # fmt: skip
    """A program: HEADS heads of a token. NOPE2, PAIRS2: the next powers of two."""
    D: tl.constexpr = NOPE + 2 * PAIRS
    chunks: tl.constexpr = (A + HEADS - 1) // HEADS
    # This program's token, its heads, and the columns of a head: nope c, pairs p, rope as it lies r.
    n = (tl.program_id(0) // chunks).to(tl.int64)
    h = (tl.program_id(0) % chunks * HEADS + tl.arange(0, HEADS))[:, None]
    c, p, r = tl.arange(0, NOPE2)[None, :], tl.arange(0, PAIRS2), tl.arange(0, 2 * PAIRS2)[None, :]
    cs, sn = angles(cos, sin, n % T, p, PAIRS)
    halves = (h < A) & (p < PAIRS)[None, :]
    dtype = k.dtype.element_ty

    # Read everything first: the keys' nope, and the pairs of q and of the shared rope key.
    keep = (h < A) & (c < NOPE)
    k_nope = tl.load(kv + n * kv_stride + h * (NOPE + V) + c, mask=keep)
    q += n * q_stride + h * D + NOPE
    q_a, q_b = load_pairs(q + r, (h < A) & (r < 2 * PAIRS))
    k_a, k_b = load_pairs(k_rope + n * k_rope_stride + r, r < 2 * PAIRS)
    # q is rotated in place, and a thread writes where others read.
    tl.debug_barrier()
    tl.store(q + p[None, :], (q_a * cs - q_b * sn).to(dtype), mask=halves)
    tl.store(q + PAIRS + p[None, :], (q_b * cs + q_a * sn).to(dtype), mask=halves)
    # k: its own nope, then the rotated rope key, the same for every head.
    k += n * (A * D) + h * D
    tl.store(k + c, k_nope, mask=keep)
    k += NOPE + p[None, :]
    tl.store(k, tl.broadcast_to((k_a * cs - k_b * sn).to(dtype), [HEADS, PAIRS2]), mask=halves)
    tl.store(k + PAIRS, tl.broadcast_to((k_b * cs + k_a * sn).to(dtype), [HEADS, PAIRS2]), mask=halves)


@triton.jit
def unrotated(a, b, cs, sn):
    """Gradients of rotated pairs -> of the pairs before rotation, laid side by side again, [.., 2 P]."""
    v = tl.join(a * cs + b * sn, b * cs - a * sn)
    return tl.reshape(v, [v.shape[0], v.shape[1] * 2])


@triton.jit
def heads_backward_kernel(dq, dk, dv, cos, sin, dx, dkv, dk_rope, T, q_s, q_a, q_t, k_s, k_a, k_t, v_s, v_a, v_t,
                          A: tl.constexpr, NOPE: tl.constexpr, PAIRS: tl.constexpr, V: tl.constexpr,
                          NOPE2: tl.constexpr, PAIRS2: tl.constexpr, V2: tl.constexpr,
                          HEADS: tl.constexpr):  # fmt: skip
    """A program: all heads of a token. dx is the gradient of q before the rotation; *_s, *_a, *_t are strides of
    sequences, heads and positions."""
    D: tl.constexpr = NOPE + 2 * PAIRS
    n = tl.program_id(0).to(tl.int64)
    s, t = n // T, n % T
    c, w = tl.arange(0, NOPE2)[None, :], tl.arange(0, V2)[None, :]
    p, r = tl.arange(0, PAIRS2), tl.arange(0, 2 * PAIRS2)[None, :]
    cs, sn = angles(cos, sin, t, p, PAIRS)
    dtype = dx.dtype.element_ty
    # Of the shared rope key, over heads; rotated back after the loop.
    sum_a, sum_b = tl.zeros([HEADS, PAIRS2], tl.float32), tl.zeros([HEADS, PAIRS2], tl.float32)
    for first in range(0, A, HEADS):
        h = (first + tl.arange(0, HEADS))[:, None]
        from_q = dq + s * q_s + t * q_t + h.to(tl.int64) * q_a
        from_k = dk + s * k_s + t * k_t + h.to(tl.int64) * k_a
        from_v = dv + s * v_s + t * v_t + h.to(tl.int64) * v_a
        to_q, to_kv = dx + n * (A * D) + h * D, dkv + n * (A * (NOPE + V)) + h * (NOPE + V)
        # Read all of these heads: q's nope and pairs, k's nope, the value; k's pairs go into the sums.
        keep, halves = (h < A) & (c < NOPE), (h < A) & (p < PAIRS)[None, :]
        q_nope = tl.load(from_q + c, mask=keep)
        k_nope = tl.load(from_k + c, mask=keep)
        value = tl.load(from_v + w, mask=(h < A) & (w < V))
        a = tl.load(from_q + NOPE + p[None, :], mask=halves, other=0.0).to(tl.float32)
        b = tl.load(from_q + NOPE + PAIRS + p[None, :], mask=halves, other=0.0).to(tl.float32)
        sum_a += tl.load(from_k + NOPE + p[None, :], mask=halves, other=0.0).to(tl.float32)
        sum_b += tl.load(from_k + NOPE + PAIRS + p[None, :], mask=halves, other=0.0).to(tl.float32)
        # d q: nope as it is, rope rotated back. d kv: the key's nope, then the value's.
        tl.store(to_q + c, q_nope, mask=keep)
        tl.store(to_q + NOPE + r, unrotated(a, b, cs, sn).to(dtype), mask=(h < A) & (r < 2 * PAIRS))
        tl.store(to_kv + c, k_nope, mask=keep)
        tl.store(to_kv + NOPE + w, value, mask=(h < A) & (w < V))
    # One rounding: FP32 sums over heads, rotated back in FP32.
    shared = unrotated(tl.sum(sum_a, 0)[None, :], tl.sum(sum_b, 0)[None, :], cs, sn)
    tl.store(dk_rope + n * (2 * PAIRS) + r, shared.to(dtype), mask=r < 2 * PAIRS)


class _AssembleContext(Context, Protocol):
    sizes: tuple[int, int, int, int]  # heads, nope, pairs, width of a value


class _Assemble(Function):
    @staticmethod
    def forward(
        ctx: _AssembleContext, q_NAD: Tensor, kv_NAW: Tensor, k_rope_NR: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        (n, heads, d), pairs, t = q_NAD.shape, k_rope_NR.shape[1] // 2, len(cos)
        nope = d - 2 * pairs
        ctx.save_for_backward(cos, sin)
        ctx.sizes = heads, nope, pairs, kv_NAW.shape[2] - nope
        k = q_NAD.new_empty(n // t, t, heads, d)
        chunk = min(FORWARD, _power(heads))
        heads_kernel[(n * ceil_div(heads, chunk),)](
            q_NAD, kv_NAW, k_rope_NR, cos, sin, k, t, q_NAD.stride(0), kv_NAW.stride(0), k_rope_NR.stride(0),
            *ctx.sizes, _power(nope), _power(pairs), chunk, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        # An alias and not `mark_dirty`, which refuses the slices that some FP8 engines return. The version makes the
        # backward of whoever kept q fail instead of reading rotated numbers.
        torch.autograd.graph.increment_version(q_NAD)
        q, kv = (x.unflatten(0, (-1, t)) for x in (q_NAD, kv_NAW))
        return q.transpose(1, 2).detach(), k.transpose(1, 2), kv[..., nope:].transpose(1, 2).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: _AssembleContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        heads, nope, pairs, v = ctx.sizes
        # Whatever strides the core's gradients have, a head's numbers must lie side by side.
        dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in grads)
        sequences, _, t, d = dq.shape
        n = sequences * t
        dx, dkv, dk_rope = (dq.new_empty(n, *size) for size in ((heads, d), (heads, nope + v), (2 * pairs,)))
        heads_backward_kernel[(n,)](
            dq, dk, dv, *ctx.saved_tensors, dx, dkv, dk_rope, t, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            *ctx.sizes, _power(nope), _power(pairs), _power(v), min(BACKWARD, _power(heads)), num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        return dx, dkv, dk_rope, None, None


def _power(size: int) -> int:
    return triton.next_power_of_2(size)


def assemble(
    q_NAD: Tensor, kv_NAW: Tensor, k_rope_NR: Tensor, table: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return _Assemble.apply(q_NAD, kv_NAW, k_rope_NR, *table)
