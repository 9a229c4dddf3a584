"""No network: a dispatcher for dry runs that counts the bytes each link would carry.

One process stands for one rank of a topology and supposes that every other rank routes as it does itself. A row for
expert e comes back as a row of the local expert that has e's place on its own rank, so shapes, a whole stage and its
gradients are real while the values are those of other experts. The bytes are those of the two hops (or of one hop, as
`flat`), exact for the routing given; the planner's closed forms can be checked against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dryvine.comm import routing
from dryvine.comm.api import Pending
from dryvine.comm.exchange import Meter
from dryvine.comm.payload import Format
from dryvine.comm.routing import Sum
from dryvine.comm.topology import Topology


@dataclass(frozen=True)
class FakeHandle:
    """The local routing, and how many rows one dispatch sends to each rank, over both hops."""

    counts: tuple[int, ...]
    used: tuple[int, ...]
    pair: Tensor  # [R] the pair t * K + k of each result row
    holes: Tensor
    place: Tensor  # [T, K] result row of each pair
    sends: tuple[int, ...]


class Fake:
    """A Dispatcher for rank `rank` of `topology`; `hops` is 2 for hierarchical's bytes or 1 for flat's."""

    def __init__(self, topology: Topology, rank: int, experts: int, alignment: int = 1, hops: int = 2) -> None:
        self.topology, self.rank, self.alignment, self.hops = topology, rank, alignment, hops
        self.share = experts // topology.ranks
        self.links = [topology.link(rank, other) for other in range(topology.ranks)]
        self.meter = Meter()

    def layout(self, experts_TK: Tensor, label: str = "") -> Pending[FakeHandle]:
        place_TK = experts_TK % self.share
        used = tuple(routing.count(place_TK, self.share).tolist())
        padding = routing.Padding.of(used, self.alignment, experts_TK.device)
        pair_P = place_TK.flatten().argsort(stable=True)
        row_of = padding.place[routing.invert(pair_P)].view_as(experts_TK)
        sends = self._sends(experts_TK // self.share)
        return Pending.done(FakeHandle(padding.counts, used, padding.fill(pair_P), padding.holes, row_of, sends))

    def _sends(self, rank_TK: Tensor) -> tuple[int, ...]:
        times_TW = torch.stack([(rank_TK == w).sum(1) for w in range(self.topology.ranks)], dim=1)
        if self.hops == 1:
            return tuple(times_TW.sum(0).tolist())
        hit = (times_TW > 0).sum(0).tolist()
        sends = [0] * self.topology.ranks
        here = self.topology.node_of(self.rank)
        for node, members in enumerate(self.topology.nodes):
            if node != here:
                sends[self.topology.proxy(self.rank, node)] += int((times_TW[:, list(members)] > 0).any(1).sum())
        for other in self.topology.nodes[here]:  # its own tokens, and those handed on for ranks of other nodes
            sends[other] += hit[other] * (1 + len(self.topology.clients(self.rank)))
        return tuple(sends)

    def dispatch(
        self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: FakeHandle
    ) -> Pending[tuple[Tensor, ...]]:
        token_R = handle.pair // handle.place.shape[1]
        self._count(rows, pairs, handle)
        out = [t.index_select(0, token_R) for t in rows]
        if pairs is not None:
            out.append(pairs.flatten()[handle.pair])
        for tensor in out:
            (tensor if tensor.dim() > 1 else tensor[:, None]).view(torch.uint8)[handle.holes] = 0
        return Pending.done(tuple(out))

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: FakeHandle) -> Pending[tuple[Tensor, ...]]:
        back = None if pairs is None else pairs[handle.place]
        self._count((rows,), back, handle)
        tokens, choices = handle.place.shape
        begin = torch.arange(tokens, device=rows.device) * choices
        summed = Sum(handle.place.flatten(), begin)(rows)
        return Pending.done((summed,) if back is None else (summed, back))

    def _count(self, rows: Sequence[Tensor], pairs: Tensor | None, handle: FakeHandle) -> None:
        """What combine sends, all ranks together, is what dispatch sends; so each is counted as a dispatch."""
        one_each = pairs is not None and self.hops == 1
        values = () if pairs is None else (pairs[:, :1] if one_each else pairs,)
        self.meter.add(self.links, handle.sends, Format.of((*rows, *values)).bytes)
