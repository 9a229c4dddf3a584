"""Who gets which row: from the experts that tokens chose to counts and permutations. Tensor math, no network.

Every dispatcher gives rows in one canonical order: by local expert, then by source rank, then by token. So all of
them are comparable bit by bit with `flat`, and a run's numbers do not depend on the backend.

Nothing here reads a GPU's tensor on the host but `read`: the lengths that a result has are given by the caller, who
read the counts once. (`bincount`, `nonzero` and boolean masks would each stop the host on a GPU.)

What is written here in torch is the definition, and what runs on a CPU; on a GPU `kernels` gives the same bits.

Legend: T tokens, K choices per token, P = T*K pairs, pair p = t*K + k; E experts; W ranks; X experts per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def kernels_for(tensor: Tensor) -> Any:
    """`comm.kernels` where the tensor is on a GPU, else None. Only there is triton imported."""
    if not tensor.is_cuda:
        return None
    from dryvine.comm.dispatch import kernels

    return kernels


def read(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the host, which waits once for all of them: the copies go to pinned memory."""
    if not tensors[0].is_cuda:
        return list(tensors)
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    torch.cuda.current_stream(tensors[0].device).record_event().synchronize()
    return copies


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Nested lists of integers as a tensor; to a GPU from pinned memory, so that the host goes straight on."""
    made = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
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
class RowOrder:
    """The pairs of this rank by expert, then token: the order in which a rank sends."""

    pair: Tensor  # [P] the pair at each send position
    token: Tensor  # [P] and its token
    place: Tensor  # [T, K] the send position of each pair
    message: Tensor  # int64 [W, X + 1], what each rank is told: rows for each of its experts, then 1 to refuse


def by_expert(experts_TK: Tensor, ranks: int, experts: int) -> RowOrder:
    """`ranks` hold equal, contiguous shares of `experts`."""
    kernels = kernels_for(experts_TK)
    if kernels:
        return RowOrder(*kernels.by_expert(experts_TK, ranks, experts))
    pair = experts_TK.flatten().argsort(stable=True)
    refused_W1 = repeated(experts_TK).expand(ranks, 1)
    message = torch.cat((count(experts_TK, experts).view(ranks, -1), refused_W1), dim=1)
    return RowOrder(pair, pair // experts_TK.shape[1], invert(pair).view_as(experts_TK), message)


def stable_order(keys: Tensor, below: int) -> Tensor:
    """argsort of the flattened keys [A, B], all under `below`; equal keys keep their order."""
    kernels = kernels_for(keys)
    if kernels:
        return kernels.by_expert(keys, 1, below)[0]
    return keys.flatten().argsort(stable=True)


@dataclass(frozen=True)
class Arrival:
    """Rows that came by (source rank, local expert), and the result, which has them by (expert, rank) and padded."""

    counts: tuple[int, ...]  # rows given for each local expert, with padding
    used: tuple[int, ...]  # of which real
    came: Tensor  # [R] position at which each result row came; -1 for padding
    back: Tensor  # [rows that came] the result row of each

    @staticmethod
    def of(message: Tensor, host: Tensor, alignment: int) -> Arrival:
        """From what every rank said, int64 [W, X + 1] as in `RowOrder`, and the host's copy of it."""
        used = tuple(host[:, :-1].sum(0).tolist())
        kernels = kernels_for(message)
        if kernels:
            counts = tuple(-(-n // alignment) * alignment for n in used)
            return Arrival(counts, used, *kernels.arrive(message, sum(used), sum(counts), alignment))
        padding = Padding.of(used, alignment, message.device)
        came = transposed(message[:, :-1], sum(used))
        return Arrival(padding.counts, used, padding.fill(came), padding.place[invert(came)])


@dataclass(frozen=True)
class Sum:
    """Sums of rows: result i adds rows source[begin[i]], ..., source[begin[i + 1] - 1], in that order; at most `most`.

    An atomic scatter would be shorter and give other bits in each run.
    """

    source: Tensor
    begin: Tensor  # one more than there are results
    most: int

    @staticmethod
    def plan(target: Tensor, source: Tensor, size: int, most: int) -> Sum:
        """Row source[j] is added to result target[j] < size; `target` is ascending."""
        results = torch.arange(size + 1, dtype=target.dtype, device=target.device)
        return Sum(source, torch.searchsorted(target, results), most)

    @staticmethod
    def even(source_TK: Tensor) -> Sum:
        """Each result adds as many: result t the rows source[t]."""
        tokens, choices = source_TK.shape
        begin = torch.arange(0, tokens * choices + 1, choices, device=source_TK.device)
        return Sum(source_TK.flatten(), begin, choices)

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Summed in FP32 from +0 on, one after the other, and rounded once to the rows' dtype. Rows may lie apart."""
        kernels = kernels_for(rows)
        if kernels:
            return kernels.sum_rows(rows, self.source, self.begin, self.most, out)
        # embedding_bag rounds BF16 ties away from zero, so the sum is made in FP32 and rounded by the cast.
        summed = functional.embedding_bag(
            self.source, rows.float().flatten(1), self.begin, mode="sum", include_last_offset=True
        ).view(len(self.begin) - 1, *rows.shape[1:])
        return summed.to(rows.dtype) if out is None else out.copy_(summed)


@dataclass(frozen=True)
class Padding:
    """Runs of rows, each lengthened to a multiple of the GEMM's alignment: place[r] is where real row r goes."""

    counts: tuple[int, ...]
    place: Tensor

    @staticmethod
    def of(used: Sequence[int], alignment: int, device: torch.device) -> Padding:
        counts = tuple(-(-n // alignment) * alignment for n in used)
        lengths_2X = upload((used, counts), device)
        begin = starts(lengths_2X[1])
        return Padding(counts, runs(begin, lengths_2X[0], sum(used)))

    def fill(self, index: Tensor) -> Tensor:
        """A gather index in padded order: -1 at the padding, which `payload.gather` makes zero."""
        if sum(self.counts) == len(self.place):
            return index
        return index.new_full((sum(self.counts),), -1).index_copy_(0, self.place, index)


def refuse(ranks: list[int]) -> None:
    """Raise on every rank if some rank's routing named an expert twice for one token."""
    if ranks:
        raise ValueError(
            f"routing of expert-parallel rank {ranks[0]}: a token chose the same expert twice; "
            "choices must differ within a token (use top-k without replacement)"
        )
