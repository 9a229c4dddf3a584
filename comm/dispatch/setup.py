"""What a dispatcher is built from: `Setup`, which every backend's `build` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import inf

from dryvine.comm.dispatch.exchange import Exchange, GroupExchange
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.mesh import Mesh
from dryvine.comm.topology import LinkClass, Topology, by_sizes
from dryvine.comm.watch import Watch


@dataclass(frozen=True)
class Setup:
    """One field for each thing that some backend needs; `top_k`, `tokens`, `row_bytes` and `room` only size buffers."""

    experts: int  # of a layer, over all ranks, which hold them in equal, contiguous shares
    mesh: Mesh | None = None  # None: this process alone
    topology: Topology | None = None  # the world's; None: one node
    chunks: int = 4  # parts in which tokens cross nodes
    alignment: int = 1  # each expert's rows are padded to a multiple
    top_k: int = 8
    tokens: int = 4096  # most that a rank dispatches at once
    row_bytes: int = 0  # of the widest row that travels
    by_choice: bool = False  # nvlink returns all rows of a token, and not their sum: flat's bits
    graphs: bool = False  # ops are recorded as CUDA graphs, if the dispatcher lets them
    room: float = inf  # of recorded ops: for so many times the mean of ranks' rows
    meter: Meter = field(default_factory=Meter)

    @property
    def watch(self) -> Watch | None:
        """None: torch's own deadlines."""
        return self.mesh.watch if self.mesh else None

    @property
    def rank(self) -> int:
        """This rank's number in the expert-parallel group."""
        return self.mesh.ep_rank if self.mesh else 0

    @cached_property
    def group_topology(self) -> Topology:
        """The expert-parallel group's own topology, by group rank."""
        if self.mesh is None:
            return self.topology or by_sizes([1])
        first = self.mesh.rank - self.mesh.ep_rank
        return self.world_topology.of(range(first, first + self.mesh.ep))

    @property
    def world_topology(self) -> Topology:
        return self.topology or by_sizes([self.mesh.size if self.mesh else 1])

    @property
    def links(self) -> list[LinkClass]:
        """The class of link to each rank of the group."""
        topology = self.group_topology
        return [topology.link(self.rank, other) for other in range(topology.ranks)]

    def exchange(self) -> Exchange:
        """An exchange over the whole group, which counts into this setup's meter."""
        group = self.mesh.experts if self.mesh else None
        return GroupExchange(group, self.links, self.meter, self.watch)
