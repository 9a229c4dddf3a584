"""The communicators of the two hops: the expert-parallel group, this rank's node, this rank's rail.

Three, because hop 1 and hop 2 run at the same time, and collectives of one communicator run one after another. They
are here and not with the mesh's groups in `comm/`, since only `hierarchical` needs them: a run with another dispatcher
makes no communicator that it does not use. How a group is made and connected is up to the mesh (`Mesh.new_groups`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from dryvine.comm.dispatch.copy_exchange import open_exchange
from dryvine.comm.dispatch.exchange import Exchange, GroupExchange
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.mesh import Mesh
from dryvine.comm.topology import Topology

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class HopGroups:
    """`topology` is the expert-parallel group's own, by its rank numbers; `node` and `rail` are this rank's."""

    topology: Topology
    rank: int
    all: Exchange
    node: Exchange
    rail: Exchange

    @property
    def rail_ranks(self) -> Ranks:
        return rail_of(self.topology, self.rank)


def rail_of(topology: Topology, rank: int) -> Ranks:
    return next(rail for rail in topology.rails() if rank in rail)


def make_hop_groups(mesh: Mesh, setup: Setup, by_copy: bool = False) -> HopGroups:
    """`by_copy`: inside a node rows go by copy engine, where its ranks can open their memory to each other. Collective
    over the world."""
    part, me = setup.group_topology, setup.rank
    nodes, rails = _families(mesh, setup.world_topology)
    groups = mesh.new_groups([*nodes, *rails], mesh.sms)

    def exchange(ranks: Sequence[int], by_copy: bool = False) -> Exchange:
        group = groups.get(tuple(mesh.rank - me + r for r in ranks))
        classes = [part.link(me, r) for r in ranks]
        if group and by_copy:
            if opened := open_exchange(group, classes, setup):
                return opened
            if me == ranks[0]:
                said = "nvlink: no memory that ranks %s could share; their hop 2 is an all-to-all instead"
                logging.getLogger(__name__).warning(said, ", ".join(map(str, ranks)))
        return GroupExchange(group, classes, setup.meter, setup.watch)

    here = part.nodes[part.node_of(me)]
    return HopGroups(part, me, setup.exchange(), exchange(here, by_copy), exchange(rail_of(part, me)))


def _families(mesh: Mesh, world: Topology) -> tuple[list[Ranks], list[Ranks]]:
    """The world ranks of every node's part and every rail of every expert-parallel group, in one order on all ranks."""
    nodes: list[Ranks] = []
    rails: list[Ranks] = []
    for first in range(0, mesh.size, mesh.ep):
        part = world.of(range(first, first + mesh.ep))
        nodes += [tuple(first + r for r in node) for node in part.nodes]
        rails += [tuple(first + r for r in rail) for rail in part.rails()]
    return nodes, rails
