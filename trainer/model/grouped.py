"""Grouped Linear: one weight for each expert. The weight gradient is deferred, as in linear.py.

Legend: R rows grouped by expert, X local experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dryvine.comm.dispatch.counts import DeviceCounts
from dryvine.trainer.model.linear import add_product
from dryvine.trainer.tensors.context import Context, for_later
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.weight import Weight

# Up to so many experts of V3's sizes, cuBLAS computes weight gradients faster one by one; not for 64 (docs/fp8.md).
# With counts on the device, one by one would block the host.
FEW = 8


def reads_counts(device: torch.device, training: bool) -> bool:
    """Whether products of experts in BF16 make the host read their rows' counts on this GPU, in a forward or in
    training: torch's kernel for them is for Hopper and Blackwell, and on others it is a loop; that of weight gradients
    is for Hopper."""
    return torch.cuda.get_device_capability(device)[0] not in ((9,) if training else (9, 10))


def add_grouped_product(total_XOI: Tensor, dy_RO: Tensor, x_RI: Tensor, groups: ExpertGroups) -> None:
    """total[x] += dyᵀ x over the rows of expert x, as `add_product`; on Hopper, one kernel for many experts."""
    if x_RI.is_cuda and (len(groups.counts) > FEW or isinstance(groups.counts, DeviceCounts)):
        from dryvine.trainer.model.kernels import grouped

        if grouped.fits(dy_RO, x_RI, total_XOI):
            return grouped.wgrad(dy_RO, x_RI, groups, total_XOI)
    counts = list(groups.counts)
    for total, dy, x in zip(total_XOI, dy_RO.split(counts), x_RI.split(counts), strict=True):
        add_product(total, dy, x)


def grouped_product(x_RI: Tensor, weight_XOI: Tensor, groups: ExpertGroups) -> Tensor:
    """Each row times the transposed weight of its expert."""
    if x_RI.is_cuda and x_RI.dtype == torch.bfloat16:
        return functional.grouped_mm(x_RI, weight_XOI.transpose(1, 2), offs=groups.ends)
    y_RO = x_RI.new_empty(x_RI.shape[0], weight_XOI.shape[1])
    counts = list(groups.counts)
    for x, weight, y in zip(x_RI.split(counts), weight_XOI, y_RO.split(counts), strict=True):
        torch.mm(x, weight.t(), out=y)
    return y_RO


class _GroupedContext(Context, Protocol):
    weight: Weight
    groups: ExpertGroups


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: _GroupedContext, x_RI: Tensor, weight_XOI: Weight, groups: ExpertGroups) -> Tensor:
        ctx.save_for_backward(x_RI)
        ctx.weight, ctx.groups = weight_XOI, groups
        return grouped_product(x_RI, weight_XOI.detach(), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: _GroupedContext, dy_RO: Tensor) -> tuple[Tensor, None, None]:
        (x_RI,), weight, groups = for_later(ctx), ctx.weight, ctx.groups
        weight.defer(lambda: add_grouped_product(weight.gradient(), dy_RO, x_RI, groups))
        return grouped_product(dy_RO, weight.detach().transpose(1, 2), groups), None, None


def grouped_linear(x_RI: Tensor, weight_XOI: Weight, groups: ExpertGroups) -> Tensor:
    """[R, I] -> [R, O], for rows grouped by local expert; an expert may have none."""
    return _GroupedLinear.apply(x_RI, weight_XOI, groups)
