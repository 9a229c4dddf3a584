"""Rows that arrive once per rank, copied to the local experts that need them, and summed on the way back.

`hierarchical` and DeepEP both send a row once to a rank, with the experts of all its choices. The rest is the same for
both: a copy for each choice that is an expert of this rank, in the canonical order of results, with padding.

Legend: M arrived rows, K choices of a token, R result rows, X local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.payload import Format
from dryvine.comm.dispatch.routing import Padding, Sum


@dataclass(frozen=True)
class Copies:
    """The arrived row and the choice that each result row is made from."""

    counts: tuple[int, ...]  # result rows of each local expert, with padding
    row: Tensor  # [R] the arrived row of each result row; -1 for padding
    choice: Tensor  # [R, 1] and which of its token's choices
    pick: Tensor  # [real rows] both, without padding, as row * K + k
    place: Tensor  # [real rows] the result row of each
    arrived: tuple[int, int]  # M, K
    rank_sum: Sum  # result rows -> arrived rows

    @staticmethod
    def of(key_MK: Tensor, keys: int, used: Sequence[int], alignment: int) -> Copies:
        """Result rows are ordered by `key_MK` (< `keys`; `keys` itself where a choice is no expert of this rank), equal
        keys by arrival. `used` are the real rows of each local expert, on the host."""
        rows, choices = key_MK.shape
        pick = routing.stable_order(key_MK, keys + 1)[: sum(used)]
        padding = Padding.of(used, alignment, pick.device)
        # The same pairs in order of arrival, each with its result row: what is summed per arrived row.
        pairs = routing.where(key_MK < keys, sum(used))
        result_of = torch.empty(rows * choices, dtype=torch.int64, device=pick.device)
        result_of[pick] = padding.place
        filled = padding.fill(pick)
        return Copies(
            counts=padding.counts,
            row=filled // choices,  # -1 at the padding, since // rounds down
            choice=(filled % choices)[:, None],
            pick=pick,
            place=padding.place,
            arrived=(rows, choices),
            rank_sum=Sum.plan(pairs // choices, result_of[pairs], rows, choices),
        )

    def unpack(self, wire: Format, arrived: Tensor, paired: bool) -> tuple[Tensor, ...]:
        """Wire rows [M, words] as the tensors of the payload, [R, ...] each; of `paired` ones the last, [M, K], holds a
        value for each choice and is returned as [R]."""
        tensors = wire.unpack(arrived, self.row)
        if paired:
            tensors[-1] = tensors[-1].gather(1, self.choice)[:, 0]
        return tuple(tensors)

    def scattered(self, pairs_R: Tensor) -> Tensor:
        """Each pair's value at its choice, [M, K], and zero at choices that are not this rank's."""
        values = pairs_R.new_zeros(self.arrived)
        values.view(-1)[self.pick] = pairs_R[self.place]
        return values
