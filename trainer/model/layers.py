"""The layers with weights: Linear, grouped Linear, Embedding, RMSNorm. Their backward computes dX and queues dW.

No weight gets a gradient from autograd. A weight is an input of its Function only so that the output needs a gradient;
the gradient returned for it is None, and the real one is a closure, queued by `Weight.defer`, that adds into the FP32
`main_grad`. So I and W split everywhere, accumulation is FP32 in a BF16 model, and the bits do not depend on when W
runs. (With `.grad` and hooks, dW could not be deferred and would be rounded to BF16 once per microbatch.)

Legend: N tokens, R rows of experts, X local experts, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dryvine.trainer.fp8.linear import FP8, casts
from dryvine.trainer.model.recompute import through
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.weight import Weight

R = TypeVar("R")
FEW = 8  # experts of V3's sizes, whose weight gradients cuBLAS makes faster one by one; 64 it does not (docs/fp8.md)


def add_product(total_OI: Tensor, dy_NO: Tensor, x_NI: Tensor) -> None:
    """total += dyᵀ x, with FP32 sums whatever the operands are."""
    if dy_NO.is_cuda and dy_NO.dtype == x_NI.dtype != torch.float32:
        torch.addmm(total_OI, dy_NO.t(), x_NI, out_dtype=torch.float32, out=total_OI)
    else:
        total_OI.addmm_(dy_NO.t().float(), x_NI.float())


def add_grouped_product(total_XOI: Tensor, dy_RO: Tensor, x_RI: Tensor, groups: ExpertGroups) -> None:
    """total[x] += dyᵀ x over the rows of expert x, as `add_product`; on Hopper many experts are one kernel."""
    if x_RI.is_cuda and len(groups.counts) > FEW:
        from dryvine.trainer.model.kernels import grouped

        if grouped.fits(dy_RO, x_RI):
            return grouped.wgrad(dy_RO, x_RI, groups, total_XOI)
    for total, dy, x in zip(total_XOI, dy_RO.split(groups.counts), x_RI.split(groups.counts), strict=True):
        add_product(total, dy, x)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Weight) -> Tensor:
        ctx.save_for_backward(x_NI)
        ctx.weight = weight_OI
        return functional.linear(x_NI, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, None]:
        (x_NI,), weight = ctx.saved_tensors, ctx.weight
        weight.defer(lambda: add_product(weight.gradient(), dy_NO, x_NI))
        return dy_NO @ weight if ctx.needs_input_grad[0] else None, None


class _ToFP32(Function):
    """FP32 results of BF16 operands, and FP32 gradients of them.

    A product of two BF16 numbers is exact in FP32, so tensor cores lose only what cutting their FP32 sums costs (1e-5),
    and are 20 times as fast for a gate as FP32 operands. Backward, dy is split into two BF16 numbers: 16 of 24 bits.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Weight) -> Tensor:
        ctx.save_for_backward(x_NI)
        ctx.weight = weight_OI
        if _on_tensor_cores(x_NI):
            return torch.mm(x_NI, weight_OI.t(), out_dtype=torch.float32)
        return functional.linear(x_NI.float(), weight_OI.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, None]:
        (x_NI,), weight = ctx.saved_tensors, ctx.weight
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

    def forward(self, x_NI: Tensor) -> Tensor:
        return linear(x_NI, self.weight)


def grouped_product(x_RI: Tensor, weight_XOI: Tensor, groups: ExpertGroups) -> Tensor:
    """Rows times the weight of their expert, transposed."""
    if x_RI.is_cuda and x_RI.dtype == torch.bfloat16:
        return functional.grouped_mm(x_RI, weight_XOI.transpose(1, 2), offs=groups.ends)
    y_RO = x_RI.new_empty(x_RI.shape[0], weight_XOI.shape[1])
    for x, weight, y in zip(x_RI.split(groups.counts), weight_XOI, y_RO.split(groups.counts), strict=True):
        torch.mm(x, weight.t(), out=y)
    return y_RO


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_XOI: Weight, groups: ExpertGroups) -> Tensor:
        ctx.save_for_backward(x_RI)
        ctx.weight, ctx.groups = weight_XOI, groups
        return grouped_product(x_RI, weight_XOI.detach(), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RO: Tensor) -> tuple[Tensor, None, None]:
        (x_RI,), weight, groups = ctx.saved_tensors, ctx.weight, ctx.groups
        weight.defer(lambda: add_grouped_product(weight.gradient(), dy_RO, x_RI, groups))
        return grouped_product(dy_RO, weight.detach().transpose(1, 2), groups), None, None


def grouped_linear(x_RI: Tensor, weight_XOI: Weight, groups: ExpertGroups) -> Tensor:
    """[R, I] -> [R, O], rows grouped by local expert, some of which may have none."""
    return _GroupedLinear.apply(x_RI, weight_XOI, groups)


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, weight_VH: Weight, tokens_N: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_N)
        ctx.weight = weight_VH
        return functional.embedding(tokens_N, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH: Tensor) -> tuple[None, None]:
        (tokens_N,), weight = ctx.saved_tensors, ctx.weight
        # index_put_ sorts on CUDA and so adds in a fixed order, where index_add_ races.
        weight.defer(lambda: weight.gradient().index_put_((tokens_N,), dy_NH.float(), accumulate=True))
        return None, None


class Embedding(nn.Module):
    """tokens int64 [N] -> [N, H]."""

    def __init__(self, weight_VH: Weight) -> None:
        super().__init__()
        self.weight = weight_VH

    def forward(self, tokens_N: Tensor) -> Tensor:
        return _Embedding.apply(self.weight, tokens_N)


def _norm(x_NH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> the normed x in its dtype, and 1/rms, FP32 [N, 1]. On CUDA one kernel, nine times as fast as these six."""
    if x_NH.is_cuda:
        return torch.ops.aten._fused_rms_norm(x_NH, x_NH.shape[-1:], weight_H, eps)
    x = x_NH.float()
    scale_N1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale_N1 * weight_H.float()).to(x_NH.dtype), scale_N1


def _norm_dx(dy_NH: Tensor, x_NH: Tensor, scale_N1: Tensor, weight_H: Tensor) -> Tensor:
    if x_NH.is_cuda:
        size, only_dx = x_NH.shape[-1:], [True, False]
        return torch.ops.aten._fused_rms_norm_backward(dy_NH, x_NH, size, scale_N1, weight_H, only_dx)[0]
    unit, slope = x_NH.float() * scale_N1, dy_NH.float() * weight_H.float()
    return (scale_N1 * (slope - unit * (slope * unit).mean(-1, keepdim=True))).to(x_NH.dtype)


def _norm_dw(dy_NH: Tensor, x_NH: Tensor, scale_N1: Tensor) -> Tensor:
    """FP32 [H]."""
    if x_NH.is_cuda:
        from dryvine.trainer.model.kernels import norm

        return norm.weight_gradient(dy_NH, x_NH, scale_N1)
    return (dy_NH.float() * x_NH.float() * scale_N1).sum(0)


class _RMSNorm(Function):
    """Given what it gives: `normed_NH` was made outside, by whichever kernel."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, weight_H: Weight, normed_NH: Tensor, scale_N1: Tensor) -> Tensor:
        ctx.save_for_backward(x_NH, scale_N1)
        ctx.weight = weight_H
        return normed_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH: Tensor) -> tuple[Tensor, None, None, None]:
        (x_NH, scale_N1), weight = ctx.saved_tensors, ctx.weight
        weight.defer(lambda: weight.gradient().add_(_norm_dw(dy_NH, x_NH, scale_N1)))
        return _norm_dx(dy_NH, x_NH, scale_N1, weight.detach()), None, None, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in FP32, given in x's dtype. x is [N, H].

    With `fp8` the cast for the Linears that read the result is made in the same pass and left with `fp8`.
    """

    def __init__(self, weight_H: Weight, eps: float, fp8: FP8 | None = None) -> None:
        super().__init__()
        self.weight, self.eps, self.fp8 = weight_H, eps, fp8

    def forward(self, x_NH: Tensor) -> Tensor:
        x, weight_H = x_NH.detach(), self.weight.detach()
        if self.fp8 is None:
            return _RMSNorm.apply(x_NH, self.weight, *_norm(x, weight_H, self.eps))
        rows, *given = casts(x).rmsnorm_rows(x, weight_H, self.eps, self.fp8.recipe.scales)
        normed_NH = _RMSNorm.apply(x_NH, self.weight, *given)
        self.fp8.remember(normed_NH, rows)
        return normed_NH

    def again(self, x_NH: Tensor) -> Tensor:
        """`forward` to the bit, for a backward that wants the result anew: without a gradient, and without the cast."""
        norm = _norm if self.fp8 is None else casts(x_NH).rmsnorm
        return norm(x_NH.detach(), self.weight.detach(), self.eps)[0]


def through_norm(norm: RMSNorm, x_NH: Tensor, use: Callable[..., R], again: bool) -> R:
    """use(norm(x)), its saved copies of the normed x made anew in the backward if `again`: see `through`."""
    return through(lambda: (norm(x_NH),), use, again, lambda: (norm.again(x_NH),))
