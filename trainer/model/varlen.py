"""The attention core over packed documents: causal within each document.

On a GPU in BF16 it is one kernel for all documents, torch's `varlen_attn` (flash attention). It requires queries, keys
and values of equal width, a multiple of 8; `pad_heads` pads with zeros, which change neither scores nor the values' own
columns. Elsewhere, and in FP32, which that kernel does not support, documents of about the same length are the rows of
a grid that goes through the core for whole sequences: what fills rows up is behind all else, where nothing attends to
it. (A call for each document is mostly overhead where they are short, and an N x N mask N / length times the compute.)
Where documents share their beginning it is copied to each of them first.

Legend: N tokens, A heads, D width of a query, V of a value, P places of the core.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dryvine.comm.integers import round_up
from dryvine.trainer.model.documents import Cells, Documents
from dryvine.trainer.tensors.context import Context

_STEP = 8


def pad_heads(q_NAD: Tensor, k_NAD: Tensor, v_NAV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values padded to the kernel's width where necessary."""
    width = round_up(max(q_NAD.shape[-1], v_NAV.shape[-1]), _STEP)
    q, k, v = (
        t if t.shape[-1] == width else functional.pad(t, (0, width - t.shape[-1])) for t in (q_NAD, k_NAD, v_NAV)
    )
    return q, k, v


def spread(heads: tuple[Tensor, Tensor, Tensor], documents: Documents) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [N, A, D] in the places of the core: [P, A, D]."""
    cells = documents.packed if _on_flash(heads[0]) else documents.in_grids[0]
    if cells is None:
        return heads
    q, k, v = (_Spread.apply(t, cells) for t in heads)
    return q, k, v


class _SpreadContext(Context, Protocol):
    cells: Cells


class _Spread(Function):
    """Sums the gradients of a token's copies in a fixed order, which adding into rows on a GPU would not."""

    @staticmethod
    def forward(ctx: _SpreadContext, x_NAD: Tensor, cells: Cells) -> Tensor:
        ctx.cells = cells
        return x_NAD.index_select(0, cells.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: _SpreadContext, dy_PAD: Tensor) -> tuple[Tensor, None]:
        copies, first = ctx.cells.copies, ctx.cells.first
        # Sums behind those of the tokens are dropped: there a kernel that skips empty documents writes nothing. (With
        # `include_last_offset` a GPU's last sum goes to the end of the indices, wherever the last offset is.)
        sums = functional.embedding_bag(copies, dy_PAD.flatten(1), first, mode="sum")
        return sums[: len(ctx.cells.place)].view(-1, *dy_PAD.shape[1:]), None


def attend_documents(q_PAD: Tensor, k_PAD: Tensor, v_PAD: Tensor, documents: Documents, scale: float) -> Tensor:
    """Attention over heads padded by `pad_heads`, in the places of `spread` -> [N, A, D]."""
    if not _on_flash(q_PAD):
        cells, sizes = documents.in_grids
        parts = zip(
            sizes, *(t.split([rows * length for rows, length in sizes]) for t in (q_PAD, k_PAD, v_PAD)), strict=True
        )
        return torch.cat([_grid(size, heads, scale) for size, *heads in parts]).index_select(0, cells.place)
    # Imported here: the module loads GPU libraries that a CPU host need not have.
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = documents.bounds, documents.longest
    # Without `return_aux` it is the output alone.
    out_PAD = cast(
        Tensor,
        varlen_attn(q_PAD, k_PAD, v_PAD, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0)),
    )
    return out_PAD if documents.packed is None else out_PAD.index_select(0, documents.packed.place)


def _on_flash(q_NAD: Tensor) -> bool:
    return q_NAD.is_cuda and q_NAD.dtype != torch.float32


def _grid(size: tuple[int, int], heads: Sequence[Tensor], scale: float) -> Tensor:
    """Attention over documents of one grid, end to end: [rows x length, A, D]."""
    q, k, v = (t.unflatten(0, size).transpose(1, 2) for t in heads)
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)
