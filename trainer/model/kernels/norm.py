"""RMSNorm on CUDA: forward a kernel of torch, backward one that makes both gradients of x and dy read once.

Torch's fused backward reads both twice, and would round each microbatch's sum to the weight's dtype. A program takes
consecutive rows, whole, and keeps its part of the weight's gradient in registers; torch adds the parts up. How rows are
shared out depends on the shape alone, so that the sums have the same bits on every GPU. Legend: N tokens, H hidden,
P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dryvine.comm.integers import ceil_div, round_up

PROGRAMS = 256  # at most: two to each of the 132 SMs of an H100
TILE = 4096  # elements that a program of 8 warps takes at a time: several rows, or one that may be wider


@triton.jit(do_not_specialize=["N", "rows"])
def norm_backward_kernel(dy, x, inverse, weight, residual, dx, sums, N, rows, H, dy_stride, x_stride, residual_stride,
                         ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    first = tl.program_id(0) * rows
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, mask=c < H, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    # With stages, loads of the next rows are on their way to shared memory while these wait for their sum.
    for start in tl.range(first, tl.minimum(first + rows, N), ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        row, keep = r.to(tl.int64)[:, None], (r < N)[:, None] & (c < H)[None, :]
        d = tl.load(dy + row * dy_stride + c[None, :], mask=keep, other=0.0).to(tl.float32)
        unit = tl.load(x + row * x_stride + c[None, :], mask=keep, other=0.0).to(tl.float32)
        scale = tl.load(inverse + r, mask=r < N, other=0.0)[:, None]
        unit *= scale
        total += d * unit
        slope = d * w
        mean = tl.sum(slope * unit, 1)[:, None] / H
        out = (slope - unit * mean) * scale
        if residual is not None:
            out += tl.load(residual + row * residual_stride + c[None, :], mask=keep, other=0.0).to(tl.float32)
        tl.store(dx + row * H + c[None, :], out.to(dx.dtype.element_ty), mask=keep)
    tl.store(sums + tl.program_id(0).to(tl.int64) * H + c, tl.sum(total, 0), mask=c < H)


def tile(width: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """The kernel's constants for norms of this width, and its warps: 16 elements to a thread."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, TILE // block)
    # Three stages of wider rows, or of wide ones in FP32, whose time matters less, are more than shared memory holds.
    known = {"ROWS": rows, "BLOCK": block, "STAGES": 3 if dtype.itemsize == 2 and block <= 2 * TILE else 1}
    return known, min(32, rows * block // 512)


def norm_backward(
    dy_NH: Tensor, x_NH: Tensor, inverse_N1: Tensor, weight_H: Tensor, residual_NH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows may be strided, a row's elements not."""
    n, h = x_NH.shape
    dy, x = _by_row(dy_NH), _by_row(x_NH)
    residual = None if residual_NH is None else _by_row(residual_NH)
    known, warps = tile(h, x.dtype)
    # Whole steps, so that no two programs share one.
    rows = round_up(max(1, ceil_div(n, PROGRAMS)), known["ROWS"])
    dx_NH = torch.empty(n, h, dtype=x.dtype, device=x.device)
    sums_PH = torch.empty(ceil_div(n, rows), h, dtype=torch.float32, device=x.device)
    if n:
        strides = (t.stride(0) for t in (dy, x, x if residual is None else residual))
        norm_backward_kernel[(len(sums_PH),)](
            dy, x, inverse_N1, weight_H, residual, dx_NH, sums_PH, n, rows, h, *strides, **known, num_warps=warps
        )
    return dx_NH, sums_PH.sum(0)


def _by_row(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def normalise(x_NH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Torch's own kernel, nine times as fast as the definition's six."""
    return torch.ops.aten._fused_rms_norm(x_NH, x_NH.shape[-1:], weight_H, eps)
