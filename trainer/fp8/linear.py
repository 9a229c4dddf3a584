"""Linear, and the SwiGLU FFN with or without experts, with all three products in FP8 (arXiv 2412.19437, figure 6).

    Fprop  y  = x Wᵀ     x by rows (1x128), W by blocks
    Dgrad  dx = dy W     dy by rows, the turned copy of W
    Wgrad  dW += dyᵀ x   both by columns (128x1): tiles run along the tokens that are summed over

What the backward keeps of x is its FP8 rows, turned and quantised anew for Wgrad, as V3 does: half the memory of BF16.
The FFN is one autograd function rather than three, because between its products only FP8 needs to exist: casts are
fused with SwiGLU, and its inputs are all that is kept. dW is a closure on the WGrad queue, into FP32 main gradients.

Legend: N tokens, R rows of experts, X local experts, I inputs, O outputs, F width of the FFN.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dryvine.trainer.fp8 import reference
from dryvine.trainer.fp8.gemm import Products
from dryvine.trainer.fp8.guard import Guard
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import E5M6, Quantized

if TYPE_CHECKING:
    from dryvine.trainer.fp8.recipe import Recipe


class WeightCache:
    """FP8 blocks of each weight and of its transpose, made at first use and kept until the weights change.

    A stage copy quantises a weight once a step instead of once a microbatch. The optimizer's publish step must call
    `clear`: noticing by itself that memory changed would cost a pass over it.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._held: dict[int, tuple[Any, Quantized, Quantized]] = {}

    def get(self, weight: Any) -> tuple[Quantized, Quantized]:
        """[O, I] or [X, O, I] -> its blocks, and those of its transpose."""
        held = self._held.get(id(weight))
        if held is None:
            w = weight.detach()
            kernels = casts(w)
            pair = (
                kernels.quantize_blocks(w, self.recipe.scales)
                if self.recipe.weight_tile == "128x128"
                else reference.quantize_blocks(w, self.recipe.scales, whole=True)
            )
            held = self._held[id(weight)] = (weight, *pair)  # holding the weight keeps its id its own
        return held[1], held[2]

    def clear(self) -> None:
        self._held.clear()


def casts(x: Tensor) -> ModuleType:
    """The quantisers for where x is."""
    return _kernels() if x.is_cuda else reference


def _kernels() -> ModuleType:
    from dryvine.trainer.fp8.kernels import every

    return every


class FP8:
    """The FP8 arithmetic of one rank: recipe, engine, weight cache, guard. Built once and passed to the layers."""

    def __init__(self, recipe: Recipe, engine: Products, chosen: str) -> None:
        """`chosen`: which engine and why, a line for the log."""
        self.recipe, self.engine, self.chosen = recipe, engine, chosen
        self.cache, self.guard = WeightCache(recipe), Guard()
        self._last: tuple[weakref.ref[Tensor], int, Quantized] | None = None
        self._whole: dict[int, ExpertGroups] = {}

    def linear(self, x_NI: Tensor, weight_OI: Any, after_attention: bool = False) -> Tensor:
        """x Wᵀ: [N, I] -> [N, O] in x's dtype. `after_attention`: x is kept as the recipe says for that place."""
        return _Linear.apply(x_NI, weight_OI, self, self.rows(x_NI), after_attention)

    def ffn(
        self, x_RI: Tensor, up: Any, down: Any, counts: Sequence[int] | None = None, weights_R: Tensor | None = None
    ) -> Tensor:
        """down(silu(gate) * up * row weight): [R, I] -> [R, I]. Weights [2F, I] and [I, F], or by expert [X, ...] with
        `counts` rows each."""
        groups = self.whole(x_RI) if counts is None else ExpertGroups.of(counts, x_RI)
        return _FFN.apply(x_RI, weights_R, up, down, self, self.rows(x_RI), groups)

    def ffn_forward(self, ffn: FFN, x: Quantized, weights_R: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Kept]:
        """The FFN of rows that are quantised already: [R, I] -> [R, I] in `dtype`, and what `ffn_backward` needs."""
        gate_up = self.engine.product(x, self.cache.get(ffn.up)[0], ffn.experts, dtype)
        act, kept = casts(gate_up).swiglu_rows(gate_up, weights_R, self.recipe.scales)
        self.guard.count(ffn.up, "input", x)
        self.guard.count(ffn.down, "input", act)
        return self.engine.product(act, self.cache.get(ffn.down)[0], ffn.experts, dtype), Kept(x, kept, weights_R)

    def ffn_backward(
        self, ffn: FFN, kept: Kept, dy: Quantized, turned: Operand, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """dy by rows, and what gives it by columns -> dx in `dtype` and d weights; dW is queued."""
        dact = self.engine.product(dy, self.cache.get(ffn.down)[1], ffn.experts, dtype)
        dh, dh_turned, act_turned, dweights = casts(dact).swiglu_backward(
            dact, kept.gate_up, kept.weights, ffn.groups, self.recipe.scales
        )
        self.guard.count(ffn.down, "output gradient", dy)
        self.guard.count(ffn.up, "output gradient", dh)
        self.defer_wgrad(ffn.down, turned, lambda: act_turned, ffn.groups)
        x = kept.x  # alone, or the closure would keep the rest too
        self.defer_wgrad(ffn.up, lambda: dh_turned, lambda: self.columns(x, ffn.groups), ffn.groups)
        dx = self.engine.product(dh, self.cache.get(ffn.up)[1], ffn.experts, dtype)
        return dx, None if kept.weights is None else dweights.to(kept.weights.dtype)

    def rows(self, x: Tensor) -> Quantized:
        """x as an operand of Fprop. Linears that read one tensor, one after the other, share one cast and one copy."""
        if self._last is not None:
            of, version, known = self._last
            if of() is x and version == x._version:
                return known
        q = self.quantize(x.detach().contiguous(), self.recipe.activation_tile)
        self.remember(x, q)
        return q

    def remember(self, x: Tensor, rows: Quantized) -> None:
        """`rows` is what a cast of x would give: the next Linears that read x take it."""
        self._last = (weakref.ref(x, self._forget), x._version, rows)

    def _forget(self, of: weakref.ref[Tensor]) -> None:
        """x is gone, and nobody can ask for its rows."""
        if self._last is not None and self._last[0] is of:
            self._last = None

    def whole(self, x: Tensor) -> ExpertGroups:
        """All rows as one group; kept by their number, since its tables are on the device."""
        if len(x) not in self._whole:
            groups = self._whole[len(x)] = ExpertGroups.of([len(x)], x)
            _ = groups.tables  # sent here, where compute asks: a stream that all others wait for
        return self._whole[len(x)]

    def quantize(self, x: Tensor, tile: str) -> Quantized:
        if tile == "1x128":
            return casts(x).quantize_rows(x, self.recipe.scales)
        return reference.quantize_coarse(x, tile, self.recipe.scales)

    def columns(self, kept: Quantized | E5M6, groups: ExpertGroups, width: int | None = None) -> Quantized:
        """Rows, as they were kept, as an operand of Wgrad. Of E5M6 the first `width` columns are of the tensor."""
        if isinstance(kept, E5M6):
            kernels = casts(kept.high)
            return kernels.quantize_columns(
                kernels.unpack_e5m6(kept)[:, :width].contiguous(), groups, self.recipe.scales
            )
        return casts(kept.values).quantize_columns(kept, groups, self.recipe.scales)

    def gradient(self, dy: Tensor, groups: ExpertGroups) -> tuple[Quantized, Quantized]:
        """dy as an operand of Dgrad and of Wgrad."""
        dy, scales, tile = dy.contiguous(), self.recipe.scales, self.recipe.gradient_tile
        if tile == "1x128":
            return casts(dy).quantize_both(dy, groups, scales)
        turned = reference.padded(dy.float(), groups).t().contiguous()
        return reference.quantize_coarse(dy, tile, scales), reference.quantize_coarse(turned, tile, scales)

    def defer_wgrad(self, weight: Any, dy: Operand, x: Operand, groups: ExpertGroups) -> None:
        """Queue dW += dyᵀ x, both by columns; what is not yet turned is turned there, off the way of dX."""

        def run() -> None:
            total = weight.gradient()
            self.engine.wgrad(dy(), x(), groups, total if total.dim() == 3 else total.unsqueeze(0))

        weight.defer(run)


Operand = Callable[[], Quantized]


@dataclass(frozen=True)
class FFN:
    """The weights [2F, I] and [I, F], or by expert [X, ..], and how many rows each expert has."""

    up: Any
    down: Any
    groups: ExpertGroups

    @property
    def experts(self) -> ExpertGroups | None:
        return self.groups if self.up.dim() == 3 else None


@dataclass(frozen=True)
class Kept:
    """What the backward of an FFN needs of its forward."""

    x: Quantized
    gate_up: Quantized
    weights: Tensor | None


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight: Any, fp8: FP8, rows: Quantized, after_attention: bool) -> Tensor:
        ctx.weight, ctx.fp8 = weight, fp8
        ctx.fine = after_attention and fp8.recipe.cache_after_attention == "e5m6"
        if ctx.fine:
            packed = casts(x_NI).pack_e5m6(x_NI.contiguous())
            ctx.save_for_backward(packed.high, packed.low, packed.scales)
        else:
            ctx.save_for_backward(rows.values, rows.scales)
        fp8.guard.count(weight, "input", rows)
        return fp8.engine.product(rows, fp8.cache.get(weight)[0], None, x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        fp8: FP8 = ctx.fp8
        groups = fp8.whole(dy_NO)
        dy, dy_turned = fp8.gradient(dy_NO, groups)
        fp8.guard.count(ctx.weight, "output gradient", dy)
        kept = (E5M6 if ctx.fine else Quantized)(*ctx.saved_tensors)
        width = ctx.weight.shape[-1]
        fp8.defer_wgrad(ctx.weight, lambda: dy_turned, lambda: fp8.columns(kept, groups, width), groups)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = fp8.engine.product(dy, fp8.cache.get(ctx.weight)[1], None, dy_NO.dtype)
        return dx, None, None, None, None


class _FFN(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor | None, up: Any, down: Any, fp8: FP8, rows: Quantized, groups: ExpertGroups
    ) -> Tensor:
        ctx.fp8, ctx.ffn = fp8, FFN(up, down, groups)
        y, kept = fp8.ffn_forward(ctx.ffn, rows, weights, x.dtype)
        ctx.save_for_backward(kept.x.values, kept.x.scales, kept.gate_up.values, kept.gate_up.scales, weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RI: Tensor) -> tuple[Tensor | None, ...]:
        x_values, x_scales, kept_values, kept_scales, weights = ctx.saved_tensors
        kept = Kept(Quantized(x_values, x_scales), Quantized(kept_values, kept_scales), weights)
        dy, dy_turned = ctx.fp8.gradient(dy_RI, ctx.ffn.groups)
        dx, dweights = ctx.fp8.ffn_backward(ctx.ffn, kept, dy, lambda: dy_turned, dy_RI.dtype)
        return dx, dweights, None, None, None, None, None


class Linear(nn.Module):
    """Drop-in for model/layers.Linear."""

    def __init__(self, weight_OI: Any, fp8: FP8, after_attention: bool = False) -> None:
        super().__init__()
        self.weight, self.fp8, self.after_attention = weight_OI, fp8, after_attention

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.fp8.linear(x_NI, self.weight, self.after_attention)
