"""Who gets which row: from the experts that tokens chose to counts and permutations. Tensor math, no network.

Every dispatcher gives rows in one canonical order: by local expert, then by source rank, then by token. So all of
them are comparable bit by bit with `flat`, and a run's numbers do not depend on the backend.

Nothing here reads a tensor on the host: the lengths that a result has are given by the caller, who read the counts
once. (`bincount`, `nonzero` and boolean masks would each stop the host on a GPU.)

Legend: T tokens, K choices per token, P = T*K pairs, pair p = t*K + k; E experts; W ranks; X experts per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device) -> Tensor:
    """Nested lists of integers as an int64 tensor; to a GPU from pinned memory, so that the host goes straight on."""
    made = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def count(values: Tensor, size: int) -> Tensor:
    """How often each of 0..size-1 occurs, int64 [size], where `bincount` would stop the host."""
    flat = values.flatten()
    return torch.zeros(size, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def repeated(values_TK: Tensor) -> Tensor:
    """1 if some token chose an expert twice, else 0: int64 scalar tensor."""
    ordered = values_TK.sort(dim=1).values
    return (ordered[:, 1:] == ordered[:, :-1]).any().to(torch.int64)


def invert(order: Tensor) -> Tensor:
    """The inverse permutation: invert(order)[order[i]] = i."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def starts(counts: Tensor) -> Tensor:
    """Where each run begins when runs of these lengths lie one after another."""
    return counts.cumsum(-1) - counts


def runs(begin: Tensor, lengths: Tensor, total: int) -> Tensor:
    """begin[0], begin[0]+1, ... (lengths[0] of them), then begin[1], ...; int64 [total], total = lengths.sum()."""
    shift = torch.repeat_interleave(begin - starts(lengths), lengths, output_size=total)
    return torch.arange(total, device=lengths.device) + shift


def transposed(counts_AB: Tensor, total: int) -> Tensor:
    """Rows lie in runs (a, b), a first; where to take them from so that they lie by (b, a): int64 [total].

    What came by (source, expert) is so brought to (expert, source).
    """
    begin_AB = starts(counts_AB.flatten()).view_as(counts_AB)
    return runs(begin_AB.T.flatten(), counts_AB.T.flatten(), total)


def where(mask: Tensor, total: int) -> Tensor:
    """Positions that are true in the flattened mask, ascending: `nonzero` for a known number, without a host read."""
    flat = mask.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, total)
    found = torch.empty(total + 1, dtype=torch.int64, device=flat.device)
    return found.scatter_(0, place, torch.arange(len(flat), device=flat.device))[:total]


@dataclass(frozen=True)
class Sum:
    """Sums of rows: result i adds rows source[begin[i]], source[begin[i] + 1], ..., in that order.

    An atomic scatter would be shorter and give other bits in each run.
    """

    source: Tensor
    begin: Tensor

    @staticmethod
    def plan(target: Tensor, source: Tensor, size: int) -> Sum:
        """Row source[j] is added to result target[j] < size; `target` is ascending."""
        return Sum(source, starts(count(target, size)))

    def __call__(self, rows: Tensor) -> Tensor:
        """Summed in FP32, given in the rows' dtype."""
        # On CPUs embedding_bag rounds BF16 ties away from zero, so the sum is made in FP32 and rounded by the cast.
        exact = rows if rows.is_cuda else rows.float()
        sums = torch.nn.functional.embedding_bag(self.source, exact.flatten(1), self.begin, mode="sum")
        return sums.to(rows.dtype).view(len(self.begin), *rows.shape[1:])


@dataclass(frozen=True)
class Padding:
    """Runs of rows, each lengthened to a multiple of the GEMM's alignment: place[r] is where real row r goes."""

    counts: tuple[int, ...]
    place: Tensor
    holes: Tensor

    @staticmethod
    def of(used: Sequence[int], alignment: int, device: torch.device) -> Padding:
        counts = tuple(-(-n // alignment) * alignment for n in used)
        lengths_2X = upload((used, counts), device)
        begin = starts(lengths_2X[1])
        place = runs(begin, lengths_2X[0], sum(used))
        holes = runs(begin + lengths_2X[0], lengths_2X[1] - lengths_2X[0], sum(counts) - sum(used))
        return Padding(counts, place, holes)

    def fill(self, index: Tensor) -> Tensor:
        """A gather index in padded order; the holes take row 0, to be zeroed after."""
        if not len(self.holes):
            return index
        return index.new_zeros(sum(self.counts)).index_copy_(0, self.place, index)


def refuse(ranks: list[int]) -> None:
    """Raise on every rank if some rank's routing named an expert twice for one token."""
    if ranks:
        raise ValueError(
            f"routing of expert-parallel rank {ranks[0]}: a token chose the same expert twice; "
            "choices must differ within a token (use top-k without replacement)"
        )
