"""The communicators of one expert-parallel group: all of it, this rank's node, this rank's rail.

Three, because hop 1 and hop 2 run at the same time, and collectives of one communicator run one after another. Every
rank of the world takes part in making every group, as torch asks: letting only members meet
(`use_local_synchronization`) names groups by how many a rank already has, and hangs where nodes are uneven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from dryvine.comm.dispatch.exchange import Exchange, GroupExchange, Meter
from dryvine.comm.mesh import Mesh
from dryvine.comm.topology import Topology
from dryvine.comm.watch import Watch


@dataclass(frozen=True)
class HopGroups:
    """`topology` is the expert-parallel group's own, by its rank numbers; `node` and `rail` are this rank's."""

    topology: Topology
    rank: int
    all: Exchange
    node: Exchange
    rail: Exchange
    meter: Meter

    @property
    def node_ranks(self) -> tuple[int, ...]:
        return self.topology.nodes[self.topology.node_of(self.rank)]

    @property
    def rail_ranks(self) -> tuple[int, ...]:
        return rail_of(self.topology, self.rank)


def rail_of(topology: Topology, rank: int) -> tuple[int, ...]:
    return next(rail for rail in topology.rails() if rank in rail)


def make_hop_groups(mesh: Mesh, topology: Topology, watch: Watch | None = None) -> HopGroups:
    """Collective over the world. `topology` is the world's."""
    nodes, rails = (mesh.group_of(family, mesh.sms) if mesh.ep > 1 else {} for family in _families(mesh, topology))
    first = mesh.rank - mesh.ep_rank
    part, me, meter = topology.of(range(first, first + mesh.ep)), mesh.ep_rank, Meter()

    def exchange(ranks: Sequence[int], group: dist.ProcessGroup | None) -> Exchange:
        return GroupExchange(group, [part.link(me, r) for r in ranks], meter, watch)

    node, rail = part.nodes[part.node_of(me)], rail_of(part, me)
    return HopGroups(
        part,
        me,
        exchange(range(mesh.ep), mesh.experts),
        exchange(node, nodes.get(tuple(first + r for r in node))),
        exchange(rail, rails.get(tuple(first + r for r in rail))),
        meter,
    )


def _families(mesh: Mesh, topology: Topology) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Every node's and every rail's ranks, over all expert-parallel groups, in an order that all ranks share."""
    nodes: list[tuple[int, ...]] = []
    rails: list[tuple[int, ...]] = []
    for first in range(0, mesh.size, mesh.ep):
        part = topology.of(range(first, first + mesh.ep))
        nodes += [tuple(first + r for r in node) for node in part.nodes]
        rails += [tuple(first + r for r in rail) for rail in part.rails()]
    return nodes, rails
