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
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dryvine.parallel.wgrad import WGrad
from dryvine.trainer.fp8 import reference
from dryvine.trainer.fp8.gemm import Engine
from dryvine.trainer.fp8.guard import Guard
from dryvine.trainer.fp8.tensors import E5M6, Groups, Quantized

if TYPE_CHECKING:
    from dryvine.trainer.fp8.recipe import Recipe


class Weight(Protocol):
    """A parameter with an FP32 gradient sum, as in model/layers.py."""

    def gradient(self) -> Tensor: ...


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

    def __init__(self, recipe: Recipe, engine: Engine, chosen: str, wgrad: WGrad) -> None:
        """`chosen`: which engine and why, a line for the log."""
        self.recipe, self.engine, self.chosen, self.wgrad = recipe, engine, chosen, wgrad
        self.cache, self.guard = WeightCache(recipe), Guard()
        self._last: tuple[weakref.ref[Tensor], int, Quantized] | None = None
        self._whole: dict[int, Groups] = {}

    def linear(self, x_NI: Tensor, weight_OI: Any, after_attention: bool = False) -> Tensor:
        """x Wᵀ: [N, I] -> [N, O] in x's dtype. `after_attention`: x is kept as the recipe says for that place."""
        return _Linear.apply(x_NI, weight_OI, self, self.rows(x_NI), after_attention)

    def ffn(
        self, x_RI: Tensor, up: Any, down: Any, counts: Sequence[int] | None = None, weights_R: Tensor | None = None
    ) -> Tensor:
        """down(silu(gate) * up * row weight): [R, I] -> [R, I]. Weights [2F, I] and [I, F], or by expert [X, ...] with
        `counts` rows each."""
        groups = self.whole(x_RI) if counts is None else Groups.of(counts, x_RI)
        return _FFN.apply(x_RI, weights_R, up, down, self, self.rows(x_RI), groups)

    def rows(self, x: Tensor) -> Quantized:
        """x as an operand of Fprop. Linears that read one tensor, one after the other, share one cast and one copy."""
        if self._last is not None:
            of, version, known = self._last
            if of() is x and version == x._version:
                return known
        q = self.quantize(x.detach().contiguous(), self.recipe.activation_tile)
        self._last = (weakref.ref(x), x._version, q)
        return q

    def whole(self, x: Tensor) -> Groups:
        """All rows as one group; kept by their number, since its tables are on the device."""
        if len(x) not in self._whole:
            self._whole[len(x)] = Groups.of([len(x)], x)
        return self._whole[len(x)]

    def quantize(self, x: Tensor, tile: str) -> Quantized:
        if tile == "1x128":
            return casts(x).quantize_rows(x, self.recipe.scales)
        return reference.quantize_coarse(x, tile, self.recipe.scales)

    def columns(self, x: Tensor | Quantized, groups: Groups) -> Quantized:
        """A kept input, turned, as an operand of Wgrad."""
        return casts(x.values if isinstance(x, Quantized) else x).quantize_columns(x, groups, self.recipe.scales)

    def gradient(self, dy: Tensor, groups: Groups) -> tuple[Quantized, Quantized]:
        """dy as an operand of Dgrad and of Wgrad."""
        dy, scales, tile = dy.contiguous(), self.recipe.scales, self.recipe.gradient_tile
        if tile == "1x128":
            return casts(dy).quantize_both(dy, groups, scales)
        turned = reference.padded(dy.float(), groups).t().contiguous()
        return reference.quantize_coarse(dy, tile, scales), reference.quantize_coarse(turned, tile, scales)

    def defer_wgrad(self, weight: Any, dy: Quantized, x: Quantized | E5M6, groups: Groups, turned: bool) -> None:
        """Queue dW += dyᵀ x. `x` is what was kept (rows), or already by columns when `turned`."""

        @torch.no_grad()
        def run() -> None:
            if isinstance(x, E5M6):
                wide = casts(x.high).unpack_e5m6(x)[:, : weight.shape[-1]].contiguous()
                operand = self.columns(wide, groups)
            else:
                operand = x if turned else self.columns(x, groups)
            total = weight.gradient()
            self.engine.wgrad(dy, operand, groups, total if total.dim() == 3 else total.unsqueeze(0))

        self.wgrad.put(run)


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
        saved = ctx.saved_tensors
        fp8.defer_wgrad(ctx.weight, dy_turned, E5M6(*saved) if ctx.fine else Quantized(*saved), groups, turned=False)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = fp8.engine.product(dy, fp8.cache.get(ctx.weight)[1], None, dy_NO.dtype)
        return dx, None, None, None, None


class _FFN(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor | None, up: Any, down: Any, fp8: FP8, rows: Quantized, groups: Groups
    ) -> Tensor:
        experts = groups if up.dim() == 3 else None
        gate_up = fp8.engine.product(rows, fp8.cache.get(up)[0], experts, x.dtype)
        act, kept = casts(x).swiglu_rows(gate_up, weights, fp8.recipe.scales)
        ctx.save_for_backward(rows.values, rows.scales, kept.values, kept.scales, weights)
        ctx.up, ctx.down, ctx.fp8, ctx.groups = up, down, fp8, groups
        fp8.guard.count(up, "input", rows)
        fp8.guard.count(down, "input", act)
        return fp8.engine.product(act, fp8.cache.get(down)[0], experts, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RI: Tensor) -> tuple[Tensor | None, ...]:
        fp8, up, down, groups = ctx.fp8, ctx.up, ctx.down, ctx.groups
        x_values, x_scales, kept_values, kept_scales, weights = ctx.saved_tensors
        experts = groups if up.dim() == 3 else None
        dy, dy_turned = fp8.gradient(dy_RI, groups)
        dact = fp8.engine.product(dy, fp8.cache.get(down)[1], experts, dy_RI.dtype)
        dh, dh_turned, act_turned, dweights = casts(dact).swiglu_backward(
            dact, Quantized(kept_values, kept_scales), weights, groups, fp8.recipe.scales
        )
        fp8.guard.count(down, "output gradient", dy)
        fp8.guard.count(up, "output gradient", dh)
        fp8.defer_wgrad(down, dy_turned, act_turned, groups, turned=True)
        fp8.defer_wgrad(up, dh_turned, Quantized(x_values, x_scales), groups, turned=False)
        dx = fp8.engine.product(dh, fp8.cache.get(up)[1], experts, dy_RI.dtype)
        return dx, None if weights is None else dweights.to(weights.dtype), None, None, None, None, None


class Linear(nn.Module):
    """Drop-in for model/layers.Linear."""

    def __init__(self, weight_OI: Any, fp8: FP8, after_attention: bool = False) -> None:
        super().__init__()
        self.weight, self.fp8, self.after_attention = weight_OI, fp8, after_attention

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.fp8.linear(x_NI, self.weight, self.after_attention)
