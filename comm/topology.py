"""Which ranks share a node, and over which links they talk: Topology, and how it is found. Imports no torch.

A topology is the tuple of nodes, each a tuple of ranks; a rank's place in its node is its rail, and ranks on one rail
reach each other without crossing the node (one NIC per GPU in the machines this is for). Nodes may be uneven: a rank
whose rail a smaller node lacks wraps round to one that it has. Everything else (peers, groups, bytes) is derived.

Sources are tried in a fixed order: the config, MPI where mpirun started the ranks, then the environment of torchrun, of
DeepSpeed, of SLURM, of MPI. Guessing from host names instead would fail in containers, where every process has its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, Field, PositiveInt

LinkClass: TypeAlias = Literal["self", "intra", "inter"]  # within a rank, inside a node, between nodes


class Link(NamedTuple):
    """A kind of link and what one rank can use of it, in GB/s each way."""

    kind: str
    gigabytes: float


LOOPBACK = Link("loopback", 4.0)
ETHERNET = Link("ethernet", 1.25)
NVLINK_H800 = Link("NVLink", 160.0)
INFINIBAND = Link("InfiniBand", 50.0)


class TopologyConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """`[comm.topology]`: empty fields are detected."""

    nodes: tuple[PositiveInt, ...] = Field(default=(), description="ranks on each node, e.g. [8, 8]; empty: found")
    intra: str = Field(default="", description="kind of link inside a node; empty: found")
    inter: str = Field(default="", description="kind of link between nodes; empty: found")
    intra_gigabytes: float = Field(default=0.0, ge=0, description="GB/s a rank has inside its node; 0: by kind")
    inter_gigabytes: float = Field(default=0.0, ge=0, description="GB/s a rank has between nodes; 0: by kind")


@dataclass(frozen=True)
class Topology:
    """`nodes[n]` are the ranks on node n, by rail. Ranks are those of one group, numbered from 0."""

    nodes: tuple[tuple[int, ...], ...]
    intra: Link = LOOPBACK
    inter: Link = ETHERNET
    source: str = "given"

    @property
    def ranks(self) -> int:
        return sum(map(len, self.nodes))

    @property
    def even(self) -> bool:
        return len({len(node) for node in self.nodes}) == 1

    def node_of(self, rank: int) -> int:
        return next(n for n, node in enumerate(self.nodes) if rank in node)

    def rail_of(self, rank: int) -> int:
        return self.nodes[self.node_of(rank)].index(rank)

    def proxy(self, rank: int, node: int) -> int:
        """The rank on `node` that receives what `rank` sends there: the one on its rail, or its stand-in on a smaller
        node."""
        members = self.nodes[node]
        return rank if rank in members else members[self.rail_of(rank) % len(members)]

    def clients(self, rank: int) -> tuple[int, ...]:
        """Ranks of other nodes whose proxy here is `rank`, ascending."""
        here = self.node_of(rank)
        return tuple(r for r in range(self.ranks) if self.node_of(r) != here and self.proxy(r, here) == rank)

    def rails(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that exchange rows between nodes, as disjoint groups: one per rail, merged where nodes are uneven."""
        # Union of every rank with its proxies, until no group changes.
        group = list(range(self.ranks))
        for rank in range(self.ranks):
            for node in range(len(self.nodes)):
                old, new = group[self.proxy(rank, node)], group[rank]
                group = [new if g == old else g for g in group]
        return tuple(sorted(tuple(r for r in range(self.ranks) if group[r] == g) for g in set(group)))

    def link(self, source: int, target: int) -> LinkClass:
        """The class of link between two ranks."""
        if source == target:
            return "self"
        return "intra" if self.node_of(source) == self.node_of(target) else "inter"

    def of(self, ranks: Sequence[int]) -> Topology:
        """The topology of a group, by group rank. A node without a member is left out."""
        number = {rank: i for i, rank in enumerate(ranks)}
        nodes = (tuple(number[r] for r in node if r in number) for node in self.nodes)
        return replace(self, nodes=tuple(node for node in nodes if node))


def buddy_of(topology: Topology, rank: int) -> int:
    """The rank on another node that keeps the state of `rank`."""
    return topology.proxy(rank, (topology.node_of(rank) + 1) % len(topology.nodes))


def wards_of(topology: Topology, rank: int) -> tuple[int, ...]:
    """The ranks whose state `rank` keeps: those whose buddy it is."""
    return tuple(other for other in range(topology.ranks) if buddy_of(topology, other) == rank)


def by_sizes(sizes: Sequence[int], source: str = "given") -> Topology:
    """Consecutive ranks fill node after node, as every launcher's block order does."""
    first = [sum(sizes[:n]) for n in range(len(sizes))]
    return Topology(tuple(tuple(range(f, f + size)) for f, size in zip(first, sizes, strict=True)), source=source)


def discover(
    world: int, config: TopologyConfig, env: Mapping[str, str], by_launcher: Topology | None = None
) -> Topology:
    """Config, then what the launcher itself said (`by_mpi`), then torchrun, DeepSpeed, SLURM and MPI by their
    environment, else one node. Raises ValueError with the fix."""
    topology = by_launcher if by_launcher and not config.nodes else _nodes(world, config, env)
    if topology.ranks != world:
        raise ValueError(
            f"topology by {topology.source}: {topology.ranks} ranks on {len(topology.nodes)} nodes, but the run has "
            f"{world}; set comm.topology.nodes to the ranks on each node, e.g. [8, 8]"
        )
    intra, inter = Link(config.intra or topology.intra.kind, 0), Link(config.inter or topology.inter.kind, 0)
    return replace(
        topology,
        intra=intra._replace(gigabytes=config.intra_gigabytes or speed(intra.kind)),
        inter=inter._replace(gigabytes=config.inter_gigabytes or speed(inter.kind)),
    )


def speed(kind: str) -> float:
    """GB/s each way that a rank gets from a kind of link; 1.0 for an unknown kind."""
    table = (LOOPBACK, ETHERNET, NVLINK_H800, INFINIBAND, Link("PCIe", 25.0), Link("RoCE", 50.0))
    return {link.kind.lower(): link.gigabytes for link in table}.get(kind.lower(), 1.0)


def _nodes(world: int, config: TopologyConfig, env: Mapping[str, str]) -> Topology:
    if config.nodes:
        return by_sizes(config.nodes, "comm.topology.nodes")
    if "LOCAL_WORLD_SIZE" in env:
        return _equal(world, int(env["LOCAL_WORLD_SIZE"]), "torchrun (LOCAL_WORLD_SIZE)")
    if "LOCAL_SIZE" in env and "CROSS_SIZE" in env:
        return _equal(world, int(env["LOCAL_SIZE"]), "DeepSpeed (LOCAL_SIZE)")
    if "SLURM_TASKS_PER_NODE" in env and world > 1:
        return _slurm(env)
    for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        if name in env:
            return _equal(world, int(env[name]), f"MPI ({name})")
    return by_sizes([world], "default: one node")


def _equal(world: int, local: int, source: str) -> Topology:
    if world % local:
        raise ValueError(
            f"topology by {source}: {world} ranks do not fill nodes of {local}; nodes are uneven, so set "
            "comm.topology.nodes to the ranks on each, e.g. [8, 4]"
        )
    return by_sizes([local] * (world // local), source)


def _slurm(env: Mapping[str, str]) -> Topology:
    """`2(x3),1` is three nodes of two tasks and one of one; --distribution=cyclic deals ranks out in turn."""
    sizes: list[int] = []
    for size, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_TASKS_PER_NODE"]):
        sizes += [int(size)] * int(times or 1)
    if not env.get("SLURM_DISTRIBUTION", "block").startswith("cyclic"):
        return by_sizes(sizes, "SLURM (SLURM_TASKS_PER_NODE)")
    # The node of each rank: the first rank of every node, then the second of every node that has one, ...
    turns = [n for turn in range(max(sizes)) for n, size in enumerate(sizes) if turn < size]
    nodes = tuple(tuple(r for r, n in enumerate(turns) if n == node) for node in range(len(sizes)))
    return Topology(nodes, source="SLURM (SLURM_TASKS_PER_NODE, cyclic)")


def by_mpi() -> Topology:
    """Ask MPI which ranks share memory. Collective over MPI.COMM_WORLD; importing mpi4py calls MPI_Init."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    roots = world.allgather(node.bcast(world.rank))
    nodes = (tuple(r for r, root in enumerate(roots) if root == first) for first in sorted(set(roots)))
    return Topology(tuple(nodes), source="MPI (Split_type SHARED)")


def spans(ranks: Iterable[int]) -> str:
    """[0, 1, 2, 5] as 0-2 5."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


class GroupLimit(NamedTuple):
    """Node-limited routing: experts in `groups` equal groups, of which a token uses at most `limit`."""

    groups: int
    limit: int


def mismatch(topology: Topology, experts: int, routing: GroupLimit, row_bytes: int) -> str | None:
    """Why routing groups do not fit nodes and what that costs, or None when each group lies within one node.

    A token reaches at most `limit` nodes when groups lie within nodes (DeepSeek-V3, arXiv 2412.19437, section 2.1.2);
    a group that straddles nodes lets one group cost several crossings.
    """
    per_rank, per_group = experts // topology.ranks, experts // routing.groups
    # How many nodes each group lies on.
    spans = [
        len({topology.node_of(e // per_rank) for e in range(g * per_group, (g + 1) * per_group)})
        for g in range(routing.groups)
    ]
    # The groups that a token may use, if they are those that lie on the most nodes.
    worst = min(sum(sorted(spans)[-routing.limit :]), len(topology.nodes))
    best = min(routing.limit, len(topology.nodes))
    if worst <= best:
        return None
    return (
        f"routing groups do not fit nodes: {routing.groups} groups of {per_group} experts over {len(topology.nodes)} "
        f"nodes, {sum(s > 1 for s in spans)} groups straddle; a token may reach {worst} nodes instead of {best}, "
        f"up to {(worst - best) * row_bytes} bytes more a token and layer; choose expert-parallel nodes that divide "
        f"the groups"
    )
