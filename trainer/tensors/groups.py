"""Rows grouped by expert: how many each has, and the tables by which kernels find them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from dryvine.comm.dispatch.routing import upload
from dryvine.trainer.tensors.tiles import TILE, blocks


@dataclass(frozen=True)
class ExpertGroups:
    """Rows of local experts, one after the other: `counts` on the host, `ends` and tables for kernels on `device`.

    FP8's Wgrad contracts over an expert's rows, so its operands give every expert a whole number of 128-row blocks, the
    last one filled with zeros: tiles never straddle experts and no kernel needs a remainder. Each table is copied to
    the device once, at first use, and the host does not wait for it.
    """

    counts: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(counts: Sequence[int], like: Tensor) -> ExpertGroups:
        """`counts` rows to each expert, on the device of `like`."""
        return ExpertGroups(tuple(counts), like.device)

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @property
    def blocks(self) -> int:
        """128-row blocks of all experts together."""
        return sum(blocks(count) for count in self.counts)

    @cached_property
    def block_starts(self) -> tuple[int, ...]:
        """First padded block of each expert, and the end: X + 1 numbers."""
        return (0, *accumulate(blocks(count) for count in self.counts))

    @cached_property
    def ends(self) -> Tensor:
        """int32 [X]: where each expert's rows end, unpadded."""
        return upload(list(accumulate(self.counts)), self.device, torch.int32)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """int32 [B, 3]: (expert, first row, end of the expert's rows) of each block; int32 [X + 1]: `block_starts`.
        One copy to the device for both, the one of known length first: Triton compiles a kernel again for an address
        that is no multiple of 16, so addresses must not depend on the counts."""
        ends = list(accumulate(self.counts))
        flat = [
            entry
            for expert, (count, end) in enumerate(zip(self.counts, ends, strict=True))
            for first in range(end - count, end, TILE)
            for entry in (expert, first, end)
        ]
        starts = self.block_starts
        both = upload([*starts, *flat], self.device, torch.int32)
        return both[len(starts) :].view(-1, 3), both[: len(starts)]
