"""SwiGLU that saves only its input, and multiplies an expert's rows by their routing weights.

Plain autograd would save the two halves, the sigmoid and the product. Applying the weights here, before the down
projection, is mathematically equal to weighting the expert's output, and makes the combine a plain sum of rows. On a
GPU forward and backward are one kernel each (kernels/swiglu.py): in torch they move ten and twenty times the bytes.

Legend: N tokens or rows, F width of the FFN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dryvine.comm.by_device import kernel_in
from dryvine.trainer.tensors.context import Context

KERNELS = "dryvine.trainer.model.kernels.swiglu"


@kernel_in(KERNELS)
def swiglu_forward(gate_up_N2F: Tensor, weights_N: Tensor | None) -> Tensor:
    """[N, 2F] -> [N, F]. Computed in FP32, rounded once. On a GPU a row of weight zero becomes zero, whatever it holds:
    CUDA graphs have rows of no expert, which hold what their memory did, NaN perhaps, and the kernel of weight
    gradients multiplies those behind the last expert's by zero. Elsewhere there are none, and it would be a pass."""
    gate, up = gate_up_N2F.float().chunk(2, -1)
    out = torch.nn.functional.silu(gate).mul_(up)
    if weights_N is not None:
        out.mul_(weights_N.float().unsqueeze(-1))
    return out.to(gate_up_N2F.dtype)


@kernel_in(KERNELS)
def swiglu_backward(dy_NF: Tensor, gate_up_N2F: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """-> gradients of gate_up [N, 2F] and of the weights [N], each in the dtype of its tensor. In place where possible:
    on a CPU new memory costs more than the arithmetic."""
    gate, up = gate_up_N2F.float().chunk(2, -1)
    both = torch.empty_like(gate_up_N2F, dtype=torch.float32)
    (dgate, dup), dy = both.chunk(2, -1), dy_NF.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dweights = None
    if weights_N is not None:
        dweights = (dy * silu).mul_(up).sum(-1).to(weights_N.dtype)
        dy = dy * weights_N.float().unsqueeze(-1)
    torch.mul(dy, silu, out=dup)
    slope = (1 - sigmoid).mul_(gate).add_(1).mul_(sigmoid)
    torch.mul(dy, up, out=dgate).mul_(slope)
    return both.to(gate_up_N2F.dtype), dweights


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Context, gate_up_N2F: Tensor, weights_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up_N2F, weights_N)
        return swiglu_forward(gate_up_N2F, weights_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy_NF: Tensor) -> tuple[Tensor, Tensor | None]:
        return swiglu_backward(dy_NF, *ctx.saved_tensors)


def swiglu(gate_up_N2F: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """silu(first half) * second half, times each row's weight if given: [N, 2F] -> [N, F]. Computed in FP32."""
    return _SwiGLU.apply(gate_up_N2F, weights_N)
