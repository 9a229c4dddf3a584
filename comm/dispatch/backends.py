"""The dispatchers by name, and which one `auto` takes. A new one is a file and a line here; tests then run it too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import Any

import torch.distributed as dist

from dryvine.comm.dispatch.api import Dispatcher
from dryvine.comm.dispatch.deepep import DeepEP, probe
from dryvine.comm.dispatch.exchange import Exchange, GroupExchange
from dryvine.comm.dispatch.fake import Fake
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.groups import make_hop_groups
from dryvine.comm.dispatch.hierarchical import Hierarchical
from dryvine.comm.dispatch.load import InRounds
from dryvine.comm.dispatch.mpi import MpiExchange
from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.comm.mesh import Mesh
from dryvine.comm.topology import Topology, by_sizes
from dryvine.comm.watch import Watch


@dataclass(frozen=True)
class Setup:
    """What dispatchers are made from. `topology` is the world's; `mesh` None is one process alone."""

    experts: int
    mesh: Mesh | None = None
    group: dist.ProcessGroup | None = None
    topology: Topology | None = None
    watch: Watch | None = None
    chunks: int = 4
    alignment: int = 1
    top_k: int = 8
    tokens: int = 4096
    row_bytes: int = 0

    @property
    def place(self) -> tuple[Topology, int]:
        """The expert-parallel group's own topology, and this rank's number in it."""
        if self.mesh is None:
            size, rank = (self.group.size(), self.group.rank()) if self.group else (1, 0)
            return self.topology or by_sizes([size]), rank
        first = self.mesh.rank - self.mesh.ep_rank
        world = self.topology or by_sizes([self.mesh.size])
        return world.of(range(first, first + self.mesh.ep)), self.mesh.ep_rank

    def exchange(self) -> Exchange:
        topology, me = self.place
        links = [topology.link(me, other) for other in range(topology.ranks)]
        return GroupExchange(self.mesh.experts if self.mesh else self.group, links, None, self.watch)


def _flat(setup: Setup) -> Dispatcher:
    if setup.place[0].ranks == 1:
        return SingleRank(setup.experts, setup.alignment)
    return Flat(None, setup.experts, setup.alignment, setup.exchange())


def _hierarchical(setup: Setup) -> Dispatcher:
    if setup.mesh is None:
        raise ValueError("comm.dispatcher = hierarchical: makes groups of its own, so give the mesh, not one group")
    groups = make_hop_groups(setup.mesh, setup.topology or by_sizes([setup.mesh.size]), setup.watch)
    return Hierarchical(groups, setup.experts, setup.mesh.device, setup.chunks, setup.alignment)


def _deepep(setup: Setup) -> Dispatcher:
    group = setup.mesh.experts if setup.mesh else setup.group
    if group is None:
        raise ValueError("comm.dispatcher = deepep: one rank has nobody to send to; use flat")
    return DeepEP(group, setup.experts, setup.tokens, setup.top_k, setup.row_bytes, setup.alignment)


def _mpi(setup: Setup) -> Dispatcher:
    """Over this rank's expert-parallel part of COMM_WORLD, whose ranks must be numbered as the mesh's."""
    from mpi4py import MPI

    topology, me = setup.place
    world = MPI.COMM_WORLD
    part = world.Split(world.rank // topology.ranks, world.rank)
    links = [topology.link(me, other) for other in range(topology.ranks)]
    return Flat(None, setup.experts, setup.alignment, MpiExchange(part, links))


def _fake(setup: Setup) -> Dispatcher:
    topology, me = setup.place
    return Fake(topology, me, setup.experts, setup.alignment)


DISPATCHERS: dict[str, Callable[[Setup], Dispatcher]] = {
    "flat": _flat,
    "hierarchical": _hierarchical,
    "deepep": _deepep,
    "mpi": _mpi,
    "fake": _fake,
}


def make_dispatcher(
    name: str,
    mesh: Mesh | dist.ProcessGroup | None,
    experts: int,
    topology: Topology | None = None,
    imbalance: float = 0.0,
    **more: Any,
) -> Dispatcher:
    """The dispatcher of this rank's expert-parallel group, whose ranks hold experts in equal, contiguous shares.

    `name` is one of DISPATCHERS or "auto". `topology` is the world's (None: one node). `imbalance` > 0 guards memory:
    beyond that many times the mean load a dispatch goes in rounds. `more` are fields of Setup. Collective.
    """
    whole, group = (mesh, None) if isinstance(mesh, Mesh) else (None, mesh)
    setup = Setup(experts, whole, group, topology, **more)
    if name == "auto":
        name = pick(setup.place[0], setup.top_k, experts)[0]
    if name not in DISPATCHERS:
        raise ValueError(
            f"comm.dispatcher = {name!r}: no such dispatcher; choose auto or one of {', '.join(DISPATCHERS)}"
        )
    dispatcher = DISPATCHERS[name](setup)
    return InRounds(dispatcher, setup.exchange(), experts, imbalance) if imbalance else dispatcher


def pick(topology: Topology, top_k: int, experts: int) -> tuple[str, str]:
    """What `auto` takes for an expert-parallel group, and why, in one line."""
    if topology.ranks == 1:
        return "flat", "one expert-parallel rank: nothing travels"
    far = expected_rows(topology, top_k, experts)
    if len(topology.nodes) > 1:
        available = probe()[0]
        also = f"; DeepEP {available} is installed and can be asked for" if available else ""
        return "hierarchical", (
            f"{len(topology.nodes)} nodes: a token crosses {topology.inter.kind} {far.once:.2f} times, "
            f"with flat {far.each:.2f} times{also}"
        )
    return (
        "flat",
        f"one node of {topology.ranks} ranks: no crossing to save, and one hop is quicker than a plan for two",
    )


@dataclass(frozen=True)
class Crossings:
    """Expected rows per token that leave the node: `once` per node as hierarchical sends, `each` choice as flat."""

    once: float
    each: float


def expected_rows(topology: Topology, top_k: int, experts: int) -> Crossings:
    """For routing that is even over experts and sees no groups; from rank 0's node."""
    share = experts // topology.ranks
    held = [len(node) * share for node in topology.nodes[1:]]
    missed = [comb(experts - n, top_k) / comb(experts, top_k) for n in held]
    return Crossings(sum(1 - m for m in missed), top_k * sum(held) / experts)
