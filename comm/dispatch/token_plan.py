"""Where rows go when every rank gets every token: each rank computes it from the choices of all.

Only the choices are exchanged, no counts: each rank finds the tokens that its experts need. On a GPU that is three
launches (`plan_kernels`) where torch's operators were 25, whose issue took a host longer than the GPU needs for the
rows: a stable sort alone is ten.

Legend: W ranks, M the most tokens of a rank, T tokens of this one, K choices, X experts of this rank, R rows that they
receive; token n of all is w * M + t, pair p is n * K + k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.comm.by_device import kernel_in
from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.by_rank import ByRank
from dryvine.comm.dispatch.counts import DeviceCounts

KERNELS = "dryvine.comm.dispatch.plan_kernels"
ABSENT = -1  # the choice of a token that a rank does not have


@dataclass(frozen=True)
class TokenPlan:
    """Everything that both directions need, worked out once."""

    counts: Sequence[int]  # rows of each local expert, padded
    pair: Tensor  # [R] the pair of each row by expert, source, token; -1 for padding
    token: Tensor  # [R] and its token
    row: Tensor  # [W * M, K] the row of each pair; -1 where another rank has its expert
    total: Tensor  # [T, W] of each own token, its partial sums in the answers [W * M] of all ranks
    owner: Tensor  # [T, K] in the answers [W * M * K] of all ranks, that of the rank that has the expert


@dataclass
class TokenHandle:
    """This rank's routing, and the plan as soon as everybody's is here."""

    label: str  # whose routing this is, for errors
    chosen: Tensor  # int64 [T, K]
    sent: Tensor  # by `choices_to_send`
    known: TokenPlan | None = None

    @property
    def plan(self) -> TokenPlan:
        assert self.known is not None, f"{self.label}: nothing has been dispatched by this handle yet"
        return self.known

    @property
    def counts(self) -> Sequence[int]:
        return self.plan.counts


def choices_to_send(experts_TK: Tensor, most: int) -> Tensor:
    """int32 [M, K]. Raises ValueError for more than `most` tokens."""
    tokens, choices = experts_TK.shape
    if tokens > most:
        raise ValueError(f"{tokens} tokens are dispatched at once, and there is room for {most}")
    if tokens == most:
        return experts_TK.to(torch.int32)
    sent = torch.full((most, choices), ABSENT, dtype=torch.int32, device=experts_TK.device)
    sent[:tokens] = experts_TK
    return sent


class PlanGroup(NamedTuple):
    """Experts of all ranks, and the multiple to which an expert's rows are padded."""

    experts: int
    alignment: int = 1


class RowRoom(NamedTuple):
    """For the rows of plans that the host does not read: `times` the mean of ranks. Where that is less than all rows of
    the group, a routing may have more; `overflows` (int64 [1]) counts those, and what comes of them is wrong."""

    times: float
    overflows: Tensor


@dataclass(frozen=True)
class Places:
    """All of a plan but its row count, for `room` rows: of a greater number, the last are in no place."""

    # int64 [X + W + 1]: rows of each local expert that have a place, without padding; 1 for each rank to refuse; rows
    # that all places would be, with padding.
    message: Tensor
    pair: Tensor  # [room]
    token: Tensor  # [room]
    row: Tensor  # as in the plan, like all that follow
    total: Tensor
    owner: Tensor


@kernel_in(KERNELS)
def places(chosen: ByRank, own_TK: Tensor, group: PlanGroup, room: int) -> Places:
    """`chosen` are the choices [M, K] of all ranks, `own_TK` those of this one."""
    ranks, most, top_k = chosen.window.shape
    share, whole = group.experts // ranks, chosen.whole().to(torch.int64)
    local = whole.flatten() - chosen.rank * share
    key = torch.where((local >= 0) & (local < share), local, share)
    used = routing.count(key, share + 1)[:share]
    padded = -(-used // group.alignment) * group.alignment
    begin = routing.starts(padded)
    order = key.argsort(stable=True)
    shift = torch.cat((begin - routing.starts(used), begin.new_full((1,), room)))  # no place for others' experts
    place = torch.arange(len(order), device=order.device) + shift[key[order]]
    pair = order.new_full((room + 1,), ABSENT).scatter_(0, place.clamp(max=room), order)[:room]
    row = torch.empty_like(order).scatter_(0, order, torch.where(place < room, place, ABSENT))
    refused = routing.repeated(whole.view(ranks, most, top_k))
    own = torch.arange(len(own_TK), device=order.device)[:, None]
    return Places(
        message=torch.cat((used.minimum((room - begin).clamp(min=0)), refused, padded.sum().view(1))),
        pair=pair,
        token=pair // top_k,  # rounds down: -1 stays -1
        row=row.view(-1, top_k),
        total=own + torch.arange(ranks, device=order.device) * most,
        owner=((own_TK // share) * most + own) * top_k + torch.arange(top_k, device=order.device),
    )


def plan(chosen: ByRank, own_TK: Tensor, group: PlanGroup) -> TokenPlan:
    """The plan for everybody's choices; reads counts on the host, once. Raises ValueError if a token of some rank
    chose an expert twice."""
    ranks = len(chosen.window)
    share = group.experts // ranks
    found = places(chosen, own_TK, group, chosen.window.numel() + share * (group.alignment - 1))
    (told,) = routing.read(found.message)
    routing.refuse(told[share : share + ranks].nonzero().flatten().tolist())
    used = told[:share].tolist()
    padded = routing.padded(used, group.alignment)
    # On a GPU kernels take the counts from there, so that a step has the same bits whether the host knows them or not.
    on_device = chosen.is_cuda and group.alignment == 1
    counts = DeviceCounts(found.message[:share], sum(used)) if on_device else padded
    return _plan(found, counts, sum(padded))


def unread(chosen: ByRank, own_TK: Tensor, group: PlanGroup, room: RowRoom) -> TokenPlan:
    """The same without a read on the host, for as many rows as there is room for. What lies behind the last row of the
    last expert belongs to none. The alignment is to be 1."""
    ranks, pairs = len(chosen.window), chosen.window.numel()
    rows = ceil(min(room.times, ranks) * pairs / ranks)
    found = places(chosen, own_TK, group, rows)
    if rows < pairs:
        room.overflows.add_(found.message[-1:] > rows)
    return _plan(found, DeviceCounts(found.message[: group.experts // ranks], rows), rows)


def _plan(found: Places, counts: Sequence[int], rows: int) -> TokenPlan:
    return TokenPlan(counts, found.pair[:rows], found.token[:rows], found.row, found.total, found.owner)
