"""Token embedding. The weight gradient is deferred, as in linear.py. Legend: N tokens, V vocabulary, H hidden."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dryvine.trainer.tensors.context import Context
from dryvine.trainer.tensors.in_order import add_rows
from dryvine.trainer.tensors.weight import Weight


class _EmbeddingContext(Context, Protocol):
    weight: Weight


class _Embedding(Function):
    @staticmethod
    def forward(ctx: _EmbeddingContext, weight_VH: Weight, tokens_N: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_N)
        ctx.weight = weight_VH
        return functional.embedding(tokens_N, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: _EmbeddingContext, dy_NH: Tensor) -> tuple[None, None]:
        (tokens_N,), weight = ctx.saved_tensors, ctx.weight

        def add() -> None:
            add_rows(weight.gradient(), tokens_N, dy_NH.float())  # in range: the forward has read the same rows

        weight.defer(add)
        return None, None


class Embedding(nn.Module):
    """tokens int64 [N] -> [N, H]."""

    def __init__(self, weight_VH: Weight) -> None:
        super().__init__()
        self.weight = weight_VH

    def forward(self, tokens_N: Tensor) -> Tensor:
        return _Embedding.apply(self.weight, tokens_N)
