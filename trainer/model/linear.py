"""Linear in the run's dtype, and the gate's product in FP32. Their backward computes dX and defers dW.

Weight gradients do not pass through autograd. A weight is an input of its Function only so that the output requires a
gradient; the gradient returned for it is None, and the real one is computed by a closure, queued by `Weight.defer`,
that adds into the FP32 `main_grad`. So the backward can be split into I and W everywhere, accumulation is in FP32 in a
BF16 model, and the result does not depend on when W runs. (With `.grad` and hooks, dW could not be deferred and would
be rounded to BF16 once per microbatch.)

Legend: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dryvine.trainer.tensors.context import Context, for_later
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.weight import Weight


def add_product(total_OI: Tensor, dy_NO: Tensor, x_NI: Tensor) -> None:
    """total += dyᵀ x, with FP32 sums whatever the operands are."""
    if dy_NO.is_cuda and dy_NO.dtype == x_NI.dtype != torch.float32:
        torch.addmm(total_OI, dy_NO.t(), x_NI, out_dtype=torch.float32, out=total_OI)
    else:
        total_OI.addmm_(dy_NO.t().float(), x_NI.float())


class _WeightContext(Context, Protocol):
    weight: Weight


class _Linear(Function):
    @staticmethod
    def forward(ctx: _WeightContext, x_NI: Tensor, weight_OI: Weight) -> Tensor:
        ctx.save_for_backward(x_NI)
        ctx.weight = weight_OI
        return functional.linear(x_NI, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: _WeightContext, dy_NO: Tensor) -> tuple[Tensor | None, None]:
        (x_NI,), weight = for_later(ctx), ctx.weight
        weight.defer(lambda: add_product(weight.gradient(), dy_NO, x_NI))
        return dy_NO @ weight if ctx.needs_input_grad[0] else None, None


class _ToFP32(Function):
    """Products with BF16 operands and FP32 results, and with FP32 gradients.

    A product of two BF16 numbers is exact in FP32, so the only error is the truncation of the tensor cores' FP32 sums
    (1e-5), and a gate is 20 times as fast as with FP32 operands. In the backward, dy is split into two BF16 numbers,
    which keep 16 of its 24 bits.
    """

    @staticmethod
    def forward(ctx: _WeightContext, x_NI: Tensor, weight_OI: Weight) -> Tensor:
        ctx.save_for_backward(x_NI)
        ctx.weight = weight_OI
        if _on_tensor_cores(x_NI):
            return torch.mm(x_NI, weight_OI.t(), out_dtype=torch.float32)
        return functional.linear(x_NI.float(), weight_OI.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: _WeightContext, dy_NO: Tensor) -> tuple[Tensor | None, None]:
        (x_NI,), weight = for_later(ctx), ctx.weight
        if not _on_tensor_cores(x_NI):
            weight.defer(lambda: add_product(weight.gradient(), dy_NO, x_NI))
            return (dy_NO @ weight.float()).to(x_NI.dtype) if ctx.needs_input_grad[0] else None, None
        high_NO = dy_NO.bfloat16()
        both_N2O = torch.cat((high_NO, (dy_NO - high_NO).bfloat16()), 1)

        def run() -> None:
            for part_NO in both_N2O.chunk(2, 1):
                add_product(weight.gradient(), part_NO, x_NI)

        weight.defer(run)
        return both_N2O @ weight.repeat(2, 1) if ctx.needs_input_grad[0] else None, None


def _on_tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def linear(x_NI: Tensor, weight_OI: Weight) -> Tensor:
    """x Wᵀ: [N, I] -> [N, O]."""
    return _Linear.apply(x_NI, weight_OI)


def linear_to_fp32(x_NI: Tensor, weight_OI: Weight) -> Tensor:
    """x Wᵀ with nothing rounded below FP32, whatever dtype x and W have: [N, I] -> FP32 [N, O]. The gate's."""
    return _ToFP32.apply(x_NI, weight_OI)


class Linear(nn.Module):
    def __init__(self, weight_OI: Weight) -> None:
        super().__init__()
        self.weight = weight_OI

    def forward(self, x_NI: Tensor, rows: Quantized | None = None, kept: bool = False) -> Tensor:
        """`rows`, x in FP8 (`Normed`), and `kept` are used by FP8 Linears only."""
        return linear(x_NI, self.weight)
