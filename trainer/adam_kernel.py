"""AdamW on a GPU in one pass: clip, moments, master, and the weights in their own dtype, of matrices and vectors.

Memory traffic is all that it costs: with FP32 moments and BF16 weights it reads 16 bytes of an element and writes 14,
where torch's fused kernel (28 bytes), a multiplication for the clip (8) and a copy to the weights (6) move 42. BF16
moments are widened and rounded in registers. Arithmetic is FP32 except for the bias corrections, 1 - beta^t, which are
FP64; a result depends on its element alone, so shards of any size give the same bits.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from dryvine.comm.integers import ceil_div
from dryvine.trainer.adam import Operands, Update
from dryvine.trainer.ramps import OptimConfig

BLOCK = 2048  # elements of a program, 16 of each tensor for a thread


@triton.jit
def adamw_kernel(master, grad, first, second, weights, updates, N, matrices, factor, keep, rate, eps, beta1, rest1,
                 beta2, rest2, log1, log2, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < N
    # 1 - beta^t of update t, in FP64: for beta = 0.999 and t = 1 FP32 would lose three digits.
    t = tl.load(updates).to(tl.float64) + 1.0
    unbias1 = (1.0 - tl.exp(t * log1)).to(tl.float32)
    unbias2 = (1.0 - tl.exp(t * log2)).to(tl.float32)
    g = tl.load(grad + i, mask=here, other=0.0) * factor
    m = tl.load(first + i, mask=here, other=0.0).to(tl.float32) * beta1 + g * rest1
    v = tl.load(second + i, mask=here, other=0.0).to(tl.float32) * beta2 + g * g * rest2
    tl.store(first + i, m.to(first.dtype.element_ty), mask=here)
    tl.store(second + i, v.to(second.dtype.element_ty), mask=here)
    # The master moves by moments that are not yet rounded.
    slope = (m / unbias1) / (tl.sqrt_rn(tl.div_rn(v, unbias2 + tl.zeros_like(v))) + eps)
    new = tl.load(master + i, mask=here, other=0.0) * tl.where(i < matrices, keep, 1.0) - slope * rate
    tl.store(master + i, new, mask=here)
    if WEIGHTS:
        tl.store(weights + i, new.to(weights.dtype.element_ty), mask=here)


class KernelAdamW:
    """AdamW on FP32 masters and gradients, moments in FP32 or BF16, all on one GPU."""

    name = "one kernel"

    def __init__(self, config: OptimConfig) -> None:
        self.config = config

    def __call__(self, on: Operands, updates: Tensor, update: Update, weights: Tensor | None = None) -> None:
        (beta1, beta2), size = self.config.betas, on.master.numel()
        # Of no elements there is one program: a launch loads the kernel.
        adamw_kernel[(max(1, ceil_div(size, BLOCK)),)](
            # A kernel without weights never writes them: any pointer will do.
            *on.tensors, on.master if weights is None else weights, updates, size, on.matrices,
            update.factor, 1.0 - update.rate * update.decay, update.rate, self.config.eps,
            beta1, 1.0 - beta1, beta2, 1.0 - beta2, _log(beta1), _log(beta2),
            weights is not None, BLOCK, num_warps=4,
        )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
