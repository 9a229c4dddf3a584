"""Who receives which row: from the experts that tokens chose to counts and permutations. Tensor math, no network.

Every dispatcher returns rows in one canonical order: by local expert, then by source rank, then by token. So all of
them are comparable bit by bit with `flat`, and a run's numbers do not depend on the backend.

Only `read` copies a GPU's tensor to the host: the lengths that a result has are passed in by the caller, who read the
counts once. (`bincount`, `nonzero` and boolean masks would each stop the host on a GPU.)

What is written here in torch is the definition, and what runs on a CPU; on a GPU `kernels` has the same bits.

Legend: T tokens, K choices per token, P = T*K pairs, pair p = t*K + k; E experts; W ranks; X experts per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.comm.by_device import kernel_in
from dryvine.comm.integers import round_up

KERNELS = "dryvine.comm.dispatch.kernels"


def read(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the host, which waits once for all of them: the copies go to pinned memory."""
    if not tensors[0].is_cuda:
        return list(tensors)
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    torch.cuda.current_stream(tensors[0].device).record_event().synchronize()
    return copies


def upload(
    values: Sequence[int] | Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Integers, or equal rows of them, as a tensor; to a GPU from pinned memory, so that the host does not wait."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def count(values: Tensor, size: int) -> Tensor:
    """How often each of 0..size-1 occurs, int64 [size], where `bincount` would stop the host."""
    flat = values.flatten()
    return torch.zeros(size, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def repeated(experts: Tensor) -> Tensor:
    """Whether some token chose an expert twice: [..., T, K] to int64 [...] of 0 and 1. A negative choice is none."""
    ordered = experts.sort(dim=-1).values
    same = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    return same.flatten(-2).any(-1).to(torch.int64)


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

    What arrives by (source, expert) is so brought to (expert, source).
    """
    begin_AB = starts(counts_AB.flatten()).view_as(counts_AB)
    return runs(begin_AB.T.flatten(), counts_AB.T.flatten(), total)


def packed(values: Tensor, mask: Tensor, room: int) -> Tensor:
    """The values [N] where the flattened mask is true, in order, then zeros: [room], and no more than that are true. An
    index by a boolean mask would make the host wait."""
    flat = mask.flatten()
    # All others are written to one place too many, which is cut off.
    place = torch.where(flat, flat.cumsum(0) - 1, room)
    return values.new_zeros(room + 1).scatter_(0, place, values)[:room]


def where(mask: Tensor, total: int) -> Tensor:
    """Positions that are true in the flattened mask, ascending: `nonzero` for a known number, without a host read."""
    return packed(torch.arange(mask.numel(), device=mask.device), mask, total)


@dataclass(frozen=True)
class RowOrder:
    """The pairs of this rank by expert, then token: the order in which a rank sends."""

    pair: Tensor  # [P] the pair at each send position
    token: Tensor  # [P] and its token
    place: Tensor  # [T, K] the send position of each pair
    message: Tensor  # int64 [W, X + 1], what each rank is told: rows for each of its experts, then 1 to refuse


@kernel_in(KERNELS)
def by_expert(experts_TK: Tensor, ranks: int, experts: int) -> RowOrder:
    """`ranks` hold equal, contiguous shares of `experts`."""
    pair = experts_TK.flatten().argsort(stable=True)
    refused_W1 = repeated(experts_TK).expand(ranks, 1)
    message = torch.cat((count(experts_TK, experts).view(ranks, -1), refused_W1), dim=1)
    return RowOrder(pair, pair // experts_TK.shape[1], invert(pair).view_as(experts_TK), message)


@kernel_in(KERNELS)
def stable_order(keys: Tensor, below: int) -> Tensor:
    """argsort of the flattened keys [A, B], all under `below`; equal keys keep their order."""
    return keys.flatten().argsort(stable=True)


@dataclass(frozen=True)
class Padding:
    """Runs of rows, each lengthened to a multiple of the GEMM's alignment."""

    counts: tuple[int, ...]  # the lengths, padded
    place: Tensor  # where each real row goes

    @staticmethod
    def of(used: Sequence[int], alignment: int, device: torch.device) -> Padding:
        counts = padded(used, alignment)
        lengths_2X = upload((used, counts), device)
        begin = starts(lengths_2X[1])
        return Padding(counts, runs(begin, lengths_2X[0], sum(used)))

    def fill(self, index: Tensor) -> Tensor:
        """A gather index in padded order: -1 at the padding, which `payload.gather` makes zero."""
        if sum(self.counts) == len(self.place):
            return index
        return index.new_full((sum(self.counts),), -1).index_copy_(0, self.place, index)


def padded(used: Sequence[int], alignment: int) -> tuple[int, ...]:
    """Each length rounded up to a multiple of the alignment."""
    return tuple(round_up(n, alignment) for n in used)


@kernel_in(KERNELS)
def arrive(message: Tensor, used: Sequence[int], alignment: int) -> tuple[Tensor, Tensor]:
    """`order` and `back` of an `Arrival`, from what every rank told this one and the rows of each of its experts."""
    padding = Padding.of(used, alignment, message.device)
    order = transposed(message[:, :-1], sum(used))
    return padding.fill(order), padding.place[invert(order)]


@dataclass(frozen=True)
class Arrival:
    """Rows that arrive by (source rank, local expert), and the result, which has them by (expert, rank) and padded."""

    counts: Sequence[int]  # result rows of each local expert, with padding
    order: Tensor  # [R] the position among them of each result row; -1 for padding
    back: Tensor  # [rows that arrive] the result row of each

    @staticmethod
    def of(message: Tensor, host: Tensor, alignment: int) -> Arrival:
        """From what every rank told this one, int64 [W, X + 1] as in `RowOrder`, and the host's copy of it."""
        used = host[:, :-1].sum(0).tolist()
        return Arrival(padded(used, alignment), *arrive(message, used, alignment))


@kernel_in(KERNELS)
def sum_rows(rows: Tensor, source: Tensor, begin: Tensor, most: int, out: Tensor | None = None) -> Tensor:
    """Result i is the sum of rows source[begin[i]], ..., source[begin[i + 1] - 1] of [N, ...], at most `most`, in FP32
    from +0 on, one after the other, and rounded once to the rows' dtype; into `out`, whose rows may lie apart."""
    # embedding_bag rounds BF16 ties away from zero, so the sum is made in FP32 and rounded by the cast.
    summed = functional.embedding_bag(
        source, rows.float().flatten(1), begin, mode="sum", include_last_offset=True
    ).view(len(begin) - 1, *rows.shape[1:])
    return summed.to(rows.dtype) if out is None else out.copy_(summed)


@dataclass(frozen=True)
class Sum:
    """Which rows are added to which result, in which order: the arguments of `sum_rows`.

    An atomic scatter would be shorter and have other bits in each run.
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
        """Result t is the sum of rows source[t]."""
        tokens, choices = source_TK.shape
        begin = torch.arange(0, tokens * choices + 1, choices, device=source_TK.device)
        return Sum(source_TK.flatten(), begin, choices)

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        return sum_rows(rows, self.source, self.begin, self.most, out)


def refuse(ranks: Sequence[int]) -> None:
    """Raise ValueError, on every rank, if some rank's routing named an expert twice for one token."""
    if ranks:
        raise ValueError(
            f"routing of expert-parallel rank {ranks[0]}: a token chose the same expert twice; "
            "choices must differ within a token (use top-k without replacement)"
        )
