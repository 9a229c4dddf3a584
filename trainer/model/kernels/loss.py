"""The two functions of model/loss.py on a GPU: a program takes a row of logits, which is read once forward and read and
written once backward. In torch it is a dozen passes over FP32 slices. Legend as in model/loss.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time


@triton.jit
def logsumexp_kernel(logits, norms, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # Online softmax, for each of BLOCK columns by itself: the greatest x so far, and the sum of e^(x - greatest).
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        c = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(greatest, x)
        # A column that has seen only -inf would make NaN of -inf - -inf.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(greatest - shift) + tl.exp(x - shift)
        greatest = higher
    # Bring the columns' sums to one greatest, and add them up.
    top = tl.max(greatest, 0)
    tl.store(norms + row, top + tl.log(tl.sum(total * tl.exp(greatest - top), 0)))


@triton.jit
def logits_gradient_kernel(logits, targets, norms, scales, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target, norm, scale = tl.load(targets + row), tl.load(norms + row), tl.load(scales + row)
    for first in range(0, V, BLOCK):
        c = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + c, mask=c < V, other=0.0).to(tl.float32)
        # softmax - one-hot, written over the logits.
        grad = (tl.exp(x - norm) - tl.where(c == target, 1.0, 0.0)) * scale
        tl.store(logits + row * V + c, grad.to(logits.dtype.element_ty), mask=c < V)


def log_sum_exp(logits_NV: Tensor) -> Tensor:
    """log sum exp of each row, FP32 [N]."""
    n, v = logits_NV.shape
    out = torch.empty(n, dtype=torch.float32, device=logits_NV.device)
    logsumexp_kernel[(n,)](logits_NV, out, v, min(BLOCK, triton.next_power_of_2(v)), num_warps=8)
    return out


def logits_to_gradient(logits_NV: Tensor, targets_N: Tensor, norms_N: Tensor, scales_N: Tensor) -> None:
    """Logits to scale * d loss / d logits, in place: the gradient of a sum of losses, each times its scale (FP32)."""
    n, v = logits_NV.shape
    logits_gradient_kernel[(n,)](
        logits_NV, targets_N.contiguous(), norms_N, scales_N, v, min(BLOCK, triton.next_power_of_2(v)), num_warps=8
    )
