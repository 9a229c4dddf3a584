"""RMSNorm on CUDA: two kernels of torch, and the weight's gradient, the sum over tokens of dy * x / rms in one order.

In torch it is five passes over FP32 copies of both tensors; torch's fused backward would round each microbatch's sum to
the weight's dtype. Here both are read once, as they are. Legend: N tokens, H hidden, C chunks of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dryvine.comm.integers import ceil_div

# A program sums CHUNK rows of BLOCK columns, ROWS at a time; torch adds up the chunks.
ROWS = 16
CHUNK = 256
BLOCK = 128


@triton.jit
def norm_weight_kernel(dy, x, inverse, sums, N, H, dy_stride, x_stride, CHUNK: tl.constexpr, ROWS: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1)
    # ROWS partial sums for each column, so that no addition waits for the one before.
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(CHUNK // ROWS):
        r = chunk * CHUNK + i * ROWS + tl.arange(0, ROWS)
        row, keep = r.to(tl.int64)[:, None], (r < N)[:, None] & (c < H)[None, :]
        a = tl.load(dy + row * dy_stride + c[None, :], mask=keep, other=0.0).to(tl.float32)
        b = tl.load(x + row * x_stride + c[None, :], mask=keep, other=0.0).to(tl.float32)
        total += a * b * tl.load(inverse + r, mask=r < N, other=0.0)[:, None]
    tl.store(sums + chunk.to(tl.int64) * H + c, tl.sum(total, 0), mask=c < H)


def weight_gradient(dy_NH: Tensor, x_NH: Tensor, inverse_N1: Tensor) -> Tensor:
    """FP32 [H]. Rows may be strided, a row's elements not."""
    n, h = x_NH.shape
    dy, x = (t if t.stride(1) == 1 else t.contiguous() for t in (dy_NH, x_NH))
    sums_CH = torch.empty(ceil_div(n, CHUNK), h, dtype=torch.float32, device=x.device)
    if n:
        norm_weight_kernel[(ceil_div(h, BLOCK), len(sums_CH))](
            dy, x, inverse_N1, sums_CH, n, h, dy.stride(0), x.stride(0), CHUNK, ROWS, BLOCK, num_warps=4
        )
    return sums_CH.sum(0)


def normalise(x_NH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Torch's own kernel, nine times as fast as the definition's six."""
    return torch.ops.aten._fused_rms_norm(x_NH, x_NH.shape[-1:], weight_H, eps)


def input_gradient(dy_NH: Tensor, x_NH: Tensor, inverse_N1: Tensor, weight_H: Tensor) -> Tensor:
    """Torch's own kernel, asked for dx alone."""
    size, only_dx = x_NH.shape[-1:], [True, False]
    return torch.ops.aten._fused_rms_norm_backward(dy_NH, x_NH, size, inverse_N1, weight_H, only_dx)[0]
