"""No network: a dispatcher for dry runs that counts the bytes each link would carry.

One process stands for one rank of a topology and supposes that every other rank routes as it does itself. A row for
expert e comes back as a row of the local expert that has e's place on its own rank, so shapes, a whole stage and its
gradients are real while the values are those of other experts. The bytes are those of `hierarchical`, exact for the
routing given; closed forms of a plan can be checked against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.api import Dispatcher
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.dispatch.payload import Format
from dryvine.comm.dispatch.reach import nodes_of_ranks, reach
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.dispatch.single_rank import Local
from dryvine.comm.pending import Pending
from dryvine.comm.topology import Topology


@dataclass(frozen=True)
class FakeHandle:
    """The local routing, and how many rows one dispatch sends to each rank, over both hops."""

    local: Local
    sends: tuple[int, ...]

    @property
    def counts(self) -> Sequence[int]:
        return self.local.counts


def build(setup: Setup) -> Dispatcher[FakeHandle]:
    return Fake(setup.group_topology, setup.rank, setup.experts, setup.alignment, setup.meter)


class Fake:
    """A Dispatcher for rank `rank` of `topology`, which counts hierarchical's bytes."""

    def __init__(
        self, topology: Topology, rank: int, experts: int, alignment: int = 1, meter: Meter | None = None
    ) -> None:
        self.topology, self.rank, self.alignment = topology, rank, alignment
        self.share = experts // topology.ranks
        self.links = [topology.link(rank, other) for other in range(topology.ranks)]
        self.meter = meter or Meter()

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[FakeHandle]:
        order = routing.by_expert(experts_TK % self.share, 1, self.share)
        node_W = nodes_of_ranks(self.topology, experts_TK.device)
        hit = reach(experts_TK // self.share, node_W, len(self.topology.nodes))
        counts, ranks, nodes = routing.read(order.message, hit.ranks.sum(0), hit.nodes.sum(0))
        local = Local.of(order, counts, self.alignment)
        return Pending.done(FakeHandle(local, self._sends(ranks.tolist(), nodes.tolist())))

    def _sends(self, for_ranks: Sequence[int], for_nodes: Sequence[int]) -> tuple[int, ...]:
        """Rows sent to each rank over both hops, given the tokens for each rank and each node."""
        sends = [0] * self.topology.ranks
        here = self.topology.node_of(self.rank)
        for node, tokens in enumerate(for_nodes):
            if node != here:
                sends[self.topology.proxy(self.rank, node)] += tokens
        # Within the node: its own tokens, and those that it hands on for ranks of other nodes.
        for other in self.topology.nodes[here]:
            sends[other] += for_ranks[other] * (1 + len(self.topology.clients(self.rank)))
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
        payload = (*rows, *(() if pairs is None else (pairs,)))
        self.meter.add(self.links, handle.sends, Format.of(payload).bytes)
