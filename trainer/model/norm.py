"""RMSNorm, with the FP8 cast of its output for the Linears that read it. Legend: N tokens, H hidden.

The weight's gradient is deferred (tensors/weight.py). In an FP8 model norm and cast are one kernel, and the norm
returns the cast together with its output: two Linears that read one tensor share it, and no code has to keep track of
which cast belongs to which tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dryvine.comm.by_device import kernel_in
from dryvine.trainer.fp8 import fused
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.model.recompute import through
from dryvine.trainer.tensors.context import Context
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.weight import Weight

R = TypeVar("R")
KERNELS = "dryvine.trainer.model.kernels.norm"


@kernel_in(KERNELS)
def normalise(x_NH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> the normed x in its dtype, and 1 / rms, FP32 [N, 1]."""
    x = x_NH.float()
    inverse_N1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * inverse_N1).mul_(weight_H.float()).to(x_NH.dtype), inverse_N1


@kernel_in(KERNELS)
def norm_backward(
    dy_NH: Tensor, x_NH: Tensor, inverse_N1: Tensor, weight_H: Tensor, residual_NH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> the gradient of the input, [N, H] in x's dtype, and of the weight: the sum over tokens of dy * x / rms, FP32
    [H]. `residual_NH`: the input's gradient from its other reader, added before the sum is rounded."""
    unit, dy, weight_H = x_NH.float() * inverse_N1, dy_NH.float(), weight_H.float()
    product = dy * unit
    dweight_H = product.sum(0)
    # In place, as all of this file: on a CPU new memory costs as much as the arithmetic.
    mean_N1 = product.mul_(weight_H).mean(-1, keepdim=True)
    slope = torch.mul(dy, weight_H, out=product)
    dx = slope.sub_(unit.mul_(mean_N1)).mul_(inverse_N1)
    if residual_NH is not None:
        dx.add_(residual_NH)
    return dx.to(x_NH.dtype), dweight_H


class _NormContext(Context, Protocol):
    weight: Weight

    def set_materialize_grads(self, value: bool) -> None: ...


class _RMSNorm(Function):
    """Adds an output that a kernel has already computed, `normed_NH`, to the autograd graph.

    x is an output, too, for the residual stream: its gradient arrives with that of the normed x, where autograd would
    add the two in a pass of its own.
    """

    @staticmethod
    def forward(
        ctx: _NormContext, x_NH: Tensor, weight_H: Weight, normed_NH: Tensor, inverse_N1: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_NH, inverse_N1)
        ctx.weight = weight_H
        ctx.set_materialize_grads(False)  # None, and not zeros, for an x that has no other reader
        return normed_NH, x_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: _NormContext, dy_NH: Tensor, residual_NH: Tensor | None) -> tuple[Tensor, None, None, None]:
        (x_NH, inverse_N1), weight = ctx.saved_tensors, ctx.weight
        dx_NH, summed_H = norm_backward(dy_NH, x_NH, inverse_N1, weight.detach(), residual_NH)

        # Only the addition is deferred, whose order sets the bits: the sum over tokens in W would keep dy and x until
        # then, and read them again.
        def add() -> None:
            weight.gradient().add_(summed_H)

        weight.defer(add)
        return dx_NH, None, None, None


class Normed(NamedTuple):
    """A norm's output [N, H]. `rows`: its FP8 cast, for FP8 Linears that read it; None without such."""

    x: Tensor
    rows: Quantized | None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in FP32, returned in x's dtype.

    `fp8`: how the Linears that read the output multiply, if in FP8.
    """

    def __init__(self, weight_H: Weight, eps: float, fp8: FP8 | None = None) -> None:
        super().__init__()
        self.weight, self.eps, self.fp8 = weight_H, eps, fp8
        self.fused = fp8 is not None and fp8.recipe.activation_tile == "1x128"

    def forward(self, x_NH: Tensor) -> Normed:
        return self.beside(x_NH)[1]

    def beside(self, x_NH: Tensor) -> tuple[Tensor, Normed]:
        """-> x, for what else reads it, and the normed x: the backward adds up the gradients of both."""
        normed, inverse_N1 = self._compute(x_NH)
        normed_NH, x_NH = _RMSNorm.apply(x_NH, self.weight, normed.x, inverse_N1)
        return x_NH, Normed(normed_NH, normed.rows)

    def again(self, x_NH: Tensor) -> Normed:
        """The bitwise equal result for recomputation in a backward, without a gradient."""
        return self._compute(x_NH)[0]

    def _compute(self, x_NH: Tensor) -> tuple[Normed, Tensor]:
        """-> the result, outside the graph, and 1 / rms."""
        x, weight_H = x_NH.detach(), self.weight.detach()
        if self.fp8 is not None and self.fused:
            rows, normed_NH, inverse_N1 = fused.rmsnorm_rows(x, weight_H, self.eps, self.fp8.recipe.scales)
            return Normed(normed_NH, rows), inverse_N1
        normed_NH, inverse_N1 = normalise(x, weight_H, self.eps)
        return Normed(normed_NH, None if self.fp8 is None else self.fp8.rows(normed_NH)), inverse_N1


def through_norm(norm: RMSNorm, x_NH: Tensor, use: Callable[[Normed], R], again: bool) -> R:
    """use(norm(x)). With `again`, neither the normed x nor its cast is kept for the backward: see `through`."""
    return residual_through_norm(norm, x_NH, lambda _, normed: use(normed), again)


def residual_through_norm(norm: RMSNorm, x_NH: Tensor, use: Callable[[Tensor, Normed], R], again: bool) -> R:
    """use(x, norm(x)), for a residual: `use` adds to this x."""
    residual_NH, made = norm.beside(x_NH)
    return through_normed(lambda: made, lambda normed: use(residual_NH, normed), again, lambda: norm.again(x_NH))


def through_normed(
    make: Callable[[], Normed], use: Callable[[Normed], R], again: bool, remake: Callable[[], Normed]
) -> R:
    """use(make()), or with `again` recomputed by `remake`."""
    normed = make()

    def join(x_NH: Tensor, *cast: Tensor) -> R:
        if normed.rows is None:
            return use(Normed(x_NH, None))
        values, scales = cast
        return use(Normed(x_NH, Quantized(values, scales, normed.rows.tile)))

    return through(lambda: _tensors(normed), join, again, lambda: _tensors(remake()))


def _tensors(normed: Normed) -> tuple[Tensor, ...]:
    return (normed.x,) if normed.rows is None else (normed.x, normed.rows.values, normed.rows.scales)
