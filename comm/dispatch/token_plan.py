"""Where rows go when every rank gets every token: each rank computes it from the choices of all.

Only the choices are exchanged, no counts: each rank finds the tokens that its experts need.

Legend: W ranks, M the most tokens of a rank, K choices, X experts of this rank, R rows that they receive; token n of
all is w * M + t, pair p is n * K + k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.counts import DeviceCounts
from dryvine.comm.dispatch.routing import Padding, Sum

ABSENT = -1  # the choice of a token that a rank does not have


@dataclass(frozen=True)
class TokenHandle:
    """Everything that both directions need, worked out once."""

    label: str  # whose routing this is, for errors
    counts: Sequence[int]  # rows of each local expert, padded
    pair: Tensor  # [R] the pair of each row by expert, source, token; -1 for padding
    token: Tensor  # [R] and its token
    row: Tensor  # [W * M * K] the row of each pair; -1 where another rank has its expert
    partial: Sum  # of this rank's rows, by token: W * M results
    total: Sum  # of the ranks' partial sums, by own token, in the order of ranks
    owner: Tensor  # [T, K] in the answers [W * M * K] of all ranks, that of the rank that has the expert


def choices_to_send(experts_TK: Tensor, most: int) -> Tensor:
    """int32 [M, K]. Raises ValueError for more than `most` tokens."""
    tokens, choices = experts_TK.shape
    if tokens > most:
        raise ValueError(f"{tokens} tokens are dispatched at once, and there is room for {most}")
    sent = torch.full((most, choices), ABSENT, dtype=torch.int32, device=experts_TK.device)
    sent[:tokens] = experts_TK
    return sent


class PlanGroup(NamedTuple):
    """This rank of its group, experts of all ranks, and the multiple to which an expert's rows are padded."""

    rank: int
    experts: int
    alignment: int


def plan(choices_WMK: Tensor, own_TK: Tensor, group: PlanGroup, label: str) -> TokenHandle:
    """The handle for everybody's choices; reads counts on the host, once. Raises ValueError if a token of some rank
    chose an expert twice."""
    found = _Found.of(choices_WMK, group)
    host_counts, repeats = routing.read(found.counts, routing.repeated(choices_WMK))
    routing.refuse(repeats.nonzero().flatten().tolist())
    used = host_counts.tolist()
    padding = Padding.of(used, group.alignment, found.order.device)
    order = found.order[: sum(used)]
    row = torch.full((choices_WMK.numel(),), -1, dtype=torch.int64, device=order.device)
    row[order] = padding.place
    # On a GPU kernels take the counts from there, so that a step has the same bits whether the host knows them or not.
    on_device = order.is_cuda and group.alignment == 1
    counts = DeviceCounts(found.counts, sum(used)) if on_device else padding.counts
    return _handle(choices_WMK, own_TK, group, label, found, counts, padding.fill(order), row)


def unread(choices_WMK: Tensor, own_TK: Tensor, group: PlanGroup, label: str) -> TokenHandle:
    """The same without a read on the host: for as many rows as there are pairs, which no routing exceeds. What lies
    behind the last row of the last expert belongs to none. Padding is to be 1."""
    found = _Found.of(choices_WMK, group)
    places = torch.arange(choices_WMK.numel(), device=found.order.device)
    pair = torch.where(places < found.counts.sum(), found.order, ABSENT)
    row = torch.where(found.mine.flatten(), routing.invert(found.order), ABSENT)
    counts = DeviceCounts(found.counts, len(places))
    return _handle(choices_WMK, own_TK, group, label, found, counts, pair, row)


class _Found(NamedTuple):
    """This rank's pairs among all."""

    mine: Tensor  # bool [W, M, K]
    counts: Tensor  # int64 [X]
    order: Tensor  # [W * M * K] by local expert, then as they are, which is by source and token; all others come last

    @staticmethod
    def of(choices_WMK: Tensor, group: PlanGroup) -> _Found:
        share = group.experts // len(choices_WMK)
        local = choices_WMK.to(torch.int64) - group.rank * share
        mine = (local >= 0) & (local < share)
        key = torch.where(mine, local, share)
        counts = routing.count(key, share + 1)[:share]
        return _Found(mine, counts, routing.stable_order(key.flatten().unsqueeze(1), share + 1))


def _handle(
    choices_WMK: Tensor,
    own_TK: Tensor,
    group: PlanGroup,
    label: str,
    found: _Found,
    counts: Sequence[int],
    pair: Tensor,
    row: Tensor,
) -> TokenHandle:
    ranks, most, top_k = choices_WMK.shape
    share = group.experts // ranks
    sources = torch.arange(ranks, device=row.device) * most
    own = torch.arange(len(own_TK), device=row.device)
    return TokenHandle(
        label=label,
        counts=counts,
        pair=pair,
        token=pair // top_k,  # rounds down: -1 stays -1
        row=row,
        partial=_partial(found.mine, row, min(top_k, share)),
        total=Sum.even(own[:, None] + sources[None, :]),
        owner=((own_TK // share) * most + own[:, None]) * top_k + torch.arange(top_k, device=row.device),
    )


def _partial(mine_WMK: Tensor, row: Tensor, most: int) -> Sum:
    """Of a token's rows here, for every token. Its list of rows has room for all pairs."""
    ends = mine_WMK.sum(2).flatten().cumsum(0)
    return Sum(routing.packed(row, mine_WMK, len(row)), torch.cat((ends.new_zeros(1), ends)), most)
