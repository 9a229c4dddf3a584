"""A Linear whose three products are in FP8; fp8.py has a table of the operands' formats.

Legend: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dryvine.trainer.fp8.fp8 import FP8, Saved
from dryvine.trainer.tensors.context import Context, for_later
from dryvine.trainer.tensors.quantized import E5M6, Quantized
from dryvine.trainer.tensors.weight import Weight


class _LinearContext(Context, Protocol):
    weight: Weight
    fp8: FP8


class _FP8Linear(Function):
    @staticmethod
    def forward(ctx: _LinearContext, x_NI: Tensor, weight: Weight, fp8: FP8, rows: Quantized, saved: Saved) -> Tensor:
        ctx.weight, ctx.fp8 = weight, fp8
        ctx.save_for_backward(*_tensors(saved))
        fp8.guard.count(weight, "input", rows)
        return fp8.engine.product(rows, fp8.cache.fprop(weight), None, x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: _LinearContext, dy_NO: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        fp8, weight = ctx.fp8, ctx.weight
        groups = fp8.all_rows(dy_NO)
        dy, dy_transposed = fp8.gradient(dy_NO, groups)
        fp8.guard.count(weight, "output gradient", dy)
        saved, width = _saved(for_later(ctx)), weight.shape[-1]
        fp8.defer_wgrad(weight, lambda: dy_transposed, lambda: fp8.columns(saved, groups, width), groups)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = fp8.engine.product(dy, fp8.cache.dgrad(weight), None, dy_NO.dtype)
        return dx, None, None, None, None


def _tensors(saved: Saved) -> tuple[Tensor, ...]:
    match saved:
        case Tensor():
            return (saved,)
        case Quantized():
            return saved.values, saved.scales
        case E5M6():
            return saved.high, saved.low, saved.scales


def _saved(tensors: tuple[Tensor, ...]) -> Saved:
    match tensors:
        case (x,):
            return x
        case (values, scales):
            return Quantized(values, scales)
        case _:
            return E5M6(*tensors)


class FP8Linear(nn.Module):
    """x Wᵀ: [N, I] -> [N, O] in x's dtype. `after_attention`: x is rounded to the recipe's format for that place
    for its weight gradient."""

    def __init__(self, weight_OI: Weight, fp8: FP8, after_attention: bool = False) -> None:
        super().__init__()
        self.weight, self.fp8, self.after_attention = weight_OI, fp8, after_attention

    def forward(self, x_NI: Tensor, rows: Quantized | None = None, kept: bool = False) -> Tensor:
        """`rows`: x in FP8, if the preceding norm has cast it. `kept`: another operator keeps x for its backward;
        after attention it is then saved as it is, and rounded when dW runs."""
        rows = self.fp8.rows(x_NI) if rows is None else rows
        saved: Saved = rows
        if self.after_attention:
            saved = x_NI if kept else self.fp8.after_attention(x_NI)
        return _FP8Linear.apply(x_NI, self.weight, self.fp8, rows, saved)
