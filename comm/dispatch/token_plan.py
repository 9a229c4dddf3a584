"""Where rows go when every rank gets every token: each rank computes it from the choices of all.

Only the choices are exchanged, no counts: each rank finds the tokens that its experts need.

Legend: W ranks, M the most tokens of a rank, K choices, X experts of this rank, R rows that they receive; token n of
all is w * M + t, pair p is n * K + k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.routing import Padding, Sum

ABSENT = -1  # the choice of a token that a rank does not have


@dataclass(frozen=True)
class TokenHandle:
    """Everything that both directions need, worked out once."""

    label: str  # whose routing this is, for errors
    counts: tuple[int, ...]  # rows of each local expert, padded
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


def plan(choices_WMK: Tensor, own_TK: Tensor, rank: int, experts: int, alignment: int, label: str) -> TokenHandle:
    """The handle for everybody's choices; reads counts on the host, once. Raises ValueError if a token of some rank
    chose an expert twice."""
    ranks, most, top_k = choices_WMK.shape
    share = experts // ranks
    local = choices_WMK.to(torch.int64) - rank * share
    mine = (local >= 0) & (local < share)
    # By local expert, then in the order of pairs, which is by source and token. All others come last.
    key = torch.where(mine, local, share)
    tally = torch.cat((routing.count(key, share + 1)[:share], routing.repeated(choices_WMK)))
    (host,) = routing.read(tally)
    used = host[:share].tolist()
    routing.refuse(host[share:].nonzero().flatten().tolist())
    order = routing.stable_order(key.flatten().unsqueeze(1), share + 1)[: sum(used)]
    padding = Padding.of(used, alignment, order.device)
    row = torch.full((ranks * most * top_k,), -1, dtype=torch.int64, device=order.device)
    row[order] = padding.place
    pair = padding.fill(order)
    ascending = routing.where(mine, sum(used))
    sources = torch.arange(ranks, device=order.device) * most
    own = torch.arange(len(own_TK), device=order.device)
    return TokenHandle(
        label=label,
        counts=padding.counts,
        pair=pair,
        token=pair // top_k,  # rounds down: -1 stays -1
        row=row,
        partial=Sum.plan(ascending // top_k, row[ascending], ranks * most, min(top_k, share)),
        total=Sum.even(own[:, None] + sources[None, :]),
        owner=((own_TK // share) * most + own[:, None]) * top_k + torch.arange(top_k, device=order.device),
    )
