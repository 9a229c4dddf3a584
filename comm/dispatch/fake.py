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

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.exchange import Meter
from dryvine.comm.dispatch.payload import Format
from dryvine.comm.dispatch.single_rank import Local
from dryvine.comm.pending import Pending
from dryvine.comm.topology import Topology


@dataclass(frozen=True)
class FakeHandle:
    """The local routing, and how many rows one dispatch sends to each rank, over both hops."""

    local: Local
    sends: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        return self.local.counts

    @property
    def used(self) -> tuple[int, ...]:
        return self.local.used


class Fake:
    """A Dispatcher for rank `rank` of `topology`; `hops` is 2 for hierarchical's bytes or 1 for flat's."""

    def __init__(self, topology: Topology, rank: int, experts: int, alignment: int = 1, hops: int = 2) -> None:
        self.topology, self.rank, self.alignment, self.hops = topology, rank, alignment, hops
        self.share = experts // topology.ranks
        self.links = [topology.link(rank, other) for other in range(topology.ranks)]
        self.meter = Meter()

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[FakeHandle]:
        order = routing.by_expert(experts_TK % self.share, 1, self.share)
        counts, reached = routing.read(order.message, self._reached(experts_TK // self.share))
        local = Local.of(order, counts, self.alignment)
        return Pending.done(FakeHandle(local, self._sends(reached.tolist())))

    def _reached(self, rank_TK: Tensor) -> Tensor:
        """Pairs for each rank; of two hops tokens for each rank, then for each node."""
        ranks, nodes = self.topology.ranks, len(self.topology.nodes)
        if self.hops == 1:
            return routing.count(rank_TK, ranks)
        node_W = routing.upload([self.topology.node_of(w) for w in range(ranks)], rank_TK.device)
        hit = torch.zeros((len(rank_TK), ranks + nodes), dtype=torch.bool, device=rank_TK.device)
        return hit.scatter_(1, rank_TK, True).scatter_(1, ranks + node_W[rank_TK], True).sum(0)

    def _sends(self, reached: list[int]) -> tuple[int, ...]:
        if self.hops == 1:
            return tuple(reached)
        hit, far = reached[: self.topology.ranks], reached[self.topology.ranks :]
        sends = [0] * self.topology.ranks
        here = self.topology.node_of(self.rank)
        for node in range(len(far)):
            if node != here:
                sends[self.topology.proxy(self.rank, node)] += far[node]
        for other in self.topology.nodes[here]:  # its own tokens, and those handed on for ranks of other nodes
            sends[other] += hit[other] * (1 + len(self.topology.clients(self.rank)))
        return tuple(sends)

    def dispatch(
        self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: FakeHandle
    ) -> Pending[tuple[Tensor, ...]]:
        self._count(rows, pairs, handle)
        return Pending.done(handle.local.dispatch(rows, pairs))

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: FakeHandle) -> Pending[tuple[Tensor, ...]]:
        combined = handle.local.combine(rows, pairs)
        self._count((rows,), None if pairs is None else combined[1], handle)
        return Pending.done(combined)

    def _count(self, rows: Sequence[Tensor], pairs: Tensor | None, handle: FakeHandle) -> None:
        """What combine sends, all ranks together, is what dispatch sends; so each is counted as a dispatch."""
        one_each = pairs is not None and self.hops == 1
        values = () if pairs is None else (pairs[:, :1] if one_each else pairs,)
        self.meter.add(self.links, handle.sends, Format.of((*rows, *values)).bytes)
