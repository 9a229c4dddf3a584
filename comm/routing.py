"""Who gets which row: from the experts that tokens chose to counts and permutations. Tensor math, no network.

Every dispatcher gives rows in one canonical order: by local expert, then by source rank, then by token. So all of
them are comparable bit by bit with `flat`, and a run's numbers do not depend on the backend.

Nothing here reads a tensor on the host: the lengths that a result has are given by the caller, who read the counts
once. (`bincount`, `nonzero` and boolean masks would each stop the host on a GPU.)

Legend: T tokens, K choices per token, P = T*K pairs, pair p = t*K + k; E experts; W ranks; X experts per rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def by_expert(counts_WX: Tensor, total: int) -> Tensor:
    """Canonical order of rows that lie by source rank, then expert: int64 [total], position in what came."""
    begin_WX = starts(counts_WX.flatten()).view_as(counts_WX)
    return runs(begin_WX.T.flatten(), counts_WX.T.flatten(), total)


def summed(rows: Tensor, place_TK: Tensor) -> Tensor:
    """Row t of the result is the sum over k of rows[place_TK[t, k]], in FP32, in the order of k, in the rows' dtype.

    The order is fixed by hand: an atomic scatter would give other bits in each run.
    """
    if place_TK.shape[1] == 0:
        return rows.new_zeros((len(place_TK), *rows.shape[1:]))
    total = rows.index_select(0, place_TK[:, 0]).float()
    for k in range(1, place_TK.shape[1]):
        total += rows.index_select(0, place_TK[:, k])
    return total.to(rows.dtype)


def split(values: Sequence[int], size: int) -> list[list[int]]:
    """A flat list in pieces of `size`."""
    return [list(values[i : i + size]) for i in range(0, len(values), size)]
