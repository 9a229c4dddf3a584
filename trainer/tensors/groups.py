"""Rows grouped by expert: how many each has, and the tables by which kernels find them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.comm.by_device import kernel_in
from dryvine.comm.dispatch.counts import DeviceCounts
from dryvine.comm.dispatch.routing import upload
from dryvine.trainer.tensors.tiles import TILE, blocks


class Tables(NamedTuple):
    """Where kernels find the rows of X experts, int32 on the device. B counts 128-row blocks of single experts and may
    be more than there are; what lies behind the last has no rows (first = end)."""

    ends: Tensor  # [X] where each expert's rows end, unpadded
    starts: Tensor  # [X + 1] first padded block of each expert, and the number of blocks
    blocks: Tensor  # [B, 3] (expert, first row, end of the expert's rows) of each block


@kernel_in("dryvine.trainer.tensors.group_tables")
def tables_of(counts_X: Tensor, rows: int, most: int) -> Tables:
    """Of `counts_X`, int64, whose sum is `rows`, for `most` blocks."""
    counts = counts_X.tolist()
    ends, device = list(accumulate(counts)), counts_X.device
    entries = [
        (expert, first, end)
        for expert, (count, end) in enumerate(zip(counts, ends, strict=True))
        for first in range(end - count, end, TILE)
    ]
    entries += [(0, rows, rows)] * (most - len(entries))
    starts = [0, *accumulate(blocks(count) for count in counts)]
    return Tables(
        torch.tensor(ends, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(entries, dtype=torch.int32, device=device).view(-1, 3),
    )


@dataclass(frozen=True)
class ExpertGroups:
    """Rows of local experts, one after the other: `counts` of them, and tables for kernels on `device`.

    FP8's Wgrad contracts over an expert's rows, so its operands give every expert a whole number of 128-row blocks, the
    last one filled with zeros: tiles never straddle experts and no kernel needs a remainder. Tables are made once, at
    first use, on the stream of that moment, without a wait of the host. Where `counts` are on the device, everything
    but their items is known without a wait too.
    """

    counts: Sequence[int]
    device: torch.device

    @staticmethod
    def of(counts: Sequence[int], like: Tensor) -> ExpertGroups:
        """`counts` rows to each expert, on the device of `like`."""
        return ExpertGroups(counts, like.device)

    @cached_property
    def rows(self) -> int:
        return self.counts.total if isinstance(self.counts, DeviceCounts) else sum(self.counts)

    @cached_property
    def blocks(self) -> int:
        """128-row blocks of all experts together; at most so many if their counts are on the device."""
        if isinstance(self.counts, DeviceCounts):
            # The last block of each expert that has rows may have a single one.
            return (self.rows + min(self.rows, len(self.counts)) * (TILE - 1)) // TILE
        return sum(blocks(count) for count in self.counts)

    @cached_property
    def block_starts(self) -> tuple[int, ...]:
        """`Tables.starts` on the host. Waits for the device if the counts are there."""
        return (0, *accumulate(blocks(count) for count in self.counts))

    @cached_property
    def tables(self) -> Tables:
        counts = self.counts
        known = counts.on_device if isinstance(counts, DeviceCounts) else upload(list(counts), self.device)
        return tables_of(known, self.rows, self.blocks)

    @property
    def ends(self) -> Tensor:
        return self.tables.ends
