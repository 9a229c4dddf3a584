"""Token embedding. The weight gradient is deferred, as in linear.py. Legend: N tokens, V vocabulary, H hidden."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dryvine.trainer.tensors.context import Context
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
            # index_put_ sorts on CUDA and so adds in a fixed order, where index_add_ is not deterministic. `unsafe`
            # skips the range check, for which the host would wait: the forward has read the same rows.
            torch._index_put_impl_(weight.gradient(), (tokens_N,), dy_NH.float(), accumulate=True, unsafe=True)

        weight.defer(add)
        return None, None


class Embedding(nn.Module):
    """tokens int64 [N] -> [N, H]."""

    def __init__(self, weight_VH: Weight) -> None:
        super().__init__()
        self.weight = weight_VH

    def forward(self, tokens_N: Tensor) -> Tensor:
        return _Embedding.apply(self.weight, tokens_N)
