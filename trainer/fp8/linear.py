"""A Linear whose three products are in FP8; fp8.py has a table of the operands' formats.

Legend: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.tensors.context import Context
from dryvine.trainer.tensors.quantized import E5M6, Quantized
from dryvine.trainer.tensors.weight import Weight


class _LinearContext(Context, Protocol):
    weight: Weight
    fp8: FP8
    e5m6: bool


class _FP8Linear(Function):
    @staticmethod
    def forward(
        ctx: _LinearContext, x_NI: Tensor, weight: Weight, fp8: FP8, rows: Quantized, after_attention: bool
    ) -> Tensor:
        ctx.weight, ctx.fp8 = weight, fp8
        ctx.e5m6 = after_attention and fp8.recipe.cache_after_attention == "e5m6"
        if ctx.e5m6:
            packed = casts.pack_e5m6(x_NI.contiguous())
            ctx.save_for_backward(packed.high, packed.low, packed.scales)
        else:
            ctx.save_for_backward(rows.values, rows.scales)
        fp8.guard.count(weight, "input", rows)
        return fp8.engine.product(rows, fp8.cache.get(weight).fprop, None, x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: _LinearContext, dy_NO: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        fp8, weight = ctx.fp8, ctx.weight
        groups = fp8.all_rows(dy_NO)
        dy, dy_transposed = fp8.gradient(dy_NO, groups)
        fp8.guard.count(weight, "output gradient", dy)
        first, second, *scales = ctx.saved_tensors
        saved = E5M6(first, second, *scales) if ctx.e5m6 else Quantized(first, second)
        width = weight.shape[-1]
        fp8.defer_wgrad(weight, lambda: dy_transposed, lambda: fp8.columns(saved, groups, width), groups)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = fp8.engine.product(dy, fp8.cache.get(weight).dgrad, None, dy_NO.dtype)
        return dx, None, None, None, None


class FP8Linear(nn.Module):
    """x Wᵀ: [N, I] -> [N, O] in x's dtype. `after_attention`: x is saved in the recipe's format for that place."""

    def __init__(self, weight_OI: Weight, fp8: FP8, after_attention: bool = False) -> None:
        super().__init__()
        self.weight, self.fp8, self.after_attention = weight_OI, fp8, after_attention

    def forward(self, x_NI: Tensor, rows: Quantized | None = None) -> Tensor:
        """`rows`: x in FP8, if the preceding norm has cast it."""
        rows = self.fp8.rows(x_NI) if rows is None else rows
        return _FP8Linear.apply(x_NI, self.weight, self.fp8, rows, self.after_attention)
