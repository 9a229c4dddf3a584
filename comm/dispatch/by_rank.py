"""Rows that every rank of a group sent to all: where they came in, without a copy of this rank's own.

A copy of the own rows into the window, beside those of others, would cost a copy, a flag and a credit of each message:
a third of its calls of the driver, and twice the rows' bytes of memory traffic. What reads the rows picks between two
addresses instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dryvine.comm.by_device import kernel_in
from dryvine.comm.dispatch import payload, routing

KERNELS = "dryvine.comm.dispatch.kernels"


@dataclass(frozen=True)
class ByRank:
    """Row (rank, i) of all ranks, numbered rank * rows + i."""

    window: Tensor  # [ranks, rows, *tail]; of ranks that sent fewer rows the others are old, and so are all of its own
    own: Tensor  # [n <= rows, *tail]
    rank: int  # this one

    @property
    def is_cuda(self) -> bool:
        return self.window.is_cuda

    @property
    def first(self) -> int:
        """The number of this rank's first row."""
        return self.rank * self.window.shape[1]

    @property
    def rows(self) -> Tensor:
        """The window's, [ranks * rows, *tail]."""
        return self.window.flatten(0, 1)

    def values(self) -> ByRank:
        """With each value of a row as a row of its own."""
        return ByRank(self.window.flatten(1).unsqueeze(2), self.own.reshape(-1, 1), self.rank)

    def whole(self) -> Tensor:
        """A copy [ranks * rows, *tail] of all."""
        rows = self.rows.clone()
        rows[self.first : self.first + len(self.own)] = self.own
        return rows


@kernel_in(KERNELS)
def gather_by_rank(sent: ByRank, index: Tensor) -> Tensor:
    """Rows index[i], zeros where the index is negative."""
    return payload.gather(sent.whole(), index)


@kernel_in(KERNELS)
def sum_by_rank(sent: ByRank, source_NK: Tensor) -> Tensor:
    """`sum_present` of all ranks' rows."""
    return sum_present(sent.whole(), source_NK)


@kernel_in(KERNELS)
def sum_present(rows: Tensor, source_NK: Tensor) -> Tensor:
    """Result n is the sum of those rows source[n, k] of [R, ...] that are not negative, by k, as `routing.sum_rows`."""
    present = source_NK >= 0
    ends = present.sum(1).cumsum(0)
    packed = routing.packed(source_NK.flatten(), present, source_NK.numel())
    return routing.sum_rows(rows, packed, torch.cat((ends.new_zeros(1), ends)), source_NK.shape[1])
