"""The SwiGLU FFN in FP8, dense or of this rank's experts.

One autograd function rather than three, so that tensors between its products exist only in FP8: casts are fused with
SwiGLU, and only SwiGLU's inputs are saved. `forward` and `backward` are also called directly, for rows that were
dispatched in FP8.

Legend: R rows, X local experts, I inputs and outputs, F width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dryvine.trainer.fp8.fp8 import FP8, Operand
from dryvine.trainer.fp8.fused import swiglu_backward, swiglu_rows
from dryvine.trainer.tensors.context import Context
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.weight import Weight


class SavedFFN(NamedTuple):
    """The tensors that an FFN saves for its backward: x [R, I], gate_up [R, 2F], row weights [R]."""

    x: Quantized
    gate_up: Quantized
    weights: Tensor | None


@dataclass(frozen=True)
class FP8FFN:
    """down(silu(gate) * up * row weight) of R rows. `up` is [2F, I], gate first, and `down` [I, F]; for experts
    [X, ...], and `groups` assigns rows to experts."""

    fp8: FP8
    up: Weight
    down: Weight
    groups: ExpertGroups

    def __call__(self, x_RI: Tensor, weights_R: Tensor | None = None, rows: Quantized | None = None) -> Tensor:
        """[R, I] -> [R, I] in x's dtype. `rows`: x in FP8, if the preceding norm has cast it."""
        rows = self.fp8.rows(x_RI) if rows is None else rows
        return _FFN.apply(x_RI, weights_R, self.up, self.down, self, rows)

    @property
    def experts(self) -> ExpertGroups | None:
        return self.groups if self.up.dim() == 3 else None

    def forward(self, x: Quantized, weights_R: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, SavedFFN]:
        """FP8 rows [R, I] -> [R, I] in `dtype`, and what `backward` needs."""
        fp8 = self.fp8
        gate_up = fp8.engine.product(x, fp8.cache.fprop(self.up), self.experts, dtype)
        act, gate_up_rows = swiglu_rows(gate_up, weights_R, fp8.recipe.scales)
        fp8.guard.count(self.up, "input", x)
        fp8.guard.count(self.down, "input", act)
        y = fp8.engine.product(act, fp8.cache.fprop(self.down), self.experts, dtype)
        return y, SavedFFN(x, gate_up_rows, weights_R)

    def backward(
        self, saved: SavedFFN, dy: Quantized, dy_transposed: Operand, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """dy by rows, and a function that casts it by columns -> dx in `dtype` and d weights; dW are deferred."""
        fp8 = self.fp8
        dact = fp8.engine.product(dy, fp8.cache.dgrad(self.down), self.experts, dtype)
        dh, dh_transposed, act_transposed, dweights = swiglu_backward(
            dact, saved.gate_up, saved.weights, self.groups, fp8.recipe.scales
        )
        fp8.guard.count(self.down, "output gradient", dy)
        fp8.guard.count(self.up, "output gradient", dh)
        fp8.defer_wgrad(self.down, dy_transposed, lambda: act_transposed, self.groups)
        # Capturing `saved` would keep gate_up as well.
        x = saved.x
        fp8.defer_wgrad(self.up, lambda: dh_transposed, lambda: fp8.columns(x, self.groups), self.groups)
        dx = fp8.engine.product(dh, fp8.cache.dgrad(self.up), self.experts, dtype)
        return dx, None if saved.weights is None else dweights.to(saved.weights.dtype)


class _FFNContext(Context, Protocol):
    ffn: FP8FFN


class _FFN(Function):
    """The weights are inputs only so that the output requires a gradient."""

    @staticmethod
    def forward(
        ctx: _FFNContext, x: Tensor, weights: Tensor | None, up: Weight, down: Weight, ffn: FP8FFN, rows: Quantized
    ) -> Tensor:
        ctx.ffn = ffn
        y, (_, gate_up, _) = ffn.forward(rows, weights, x.dtype)
        ctx.save_for_backward(rows.values, rows.scales, gate_up.values, gate_up.scales, weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: _FFNContext, dy_RI: Tensor) -> tuple[Tensor | None, ...]:
        x_values, x_scales, gate_up_values, gate_up_scales, weights = ctx.saved_tensors
        saved = SavedFFN(Quantized(x_values, x_scales), Quantized(gate_up_values, gate_up_scales), weights)
        dy, dy_transposed = ctx.ffn.fp8.gradient(dy_RI, ctx.ffn.groups)
        dx, dweights = ctx.ffn.backward(saved, dy, lambda: dy_transposed, dy_RI.dtype)
        return dx, dweights, None, None, None, None
