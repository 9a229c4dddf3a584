"""Which wire carries a pipeline's messages: copy engines between GPUs of one node, torch.distributed elsewhere.

It also makes the first use of each NCCL communicator, in one order on all ranks. NCCL connects two ranks at their first
message and blocks the host until the peer does the same, so two ranks that start with different channels, as DualPipe's
do, would deadlock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.copy_links import expecting, open_links
from dryvine.comm.copy_wire import CopyWire, layout_rings, slot_bytes
from dryvine.comm.lines import Channel, Line
from dryvine.comm.mesh import Mesh
from dryvine.comm.pending import Pending
from dryvine.comm.topology import Topology, by_sizes
from dryvine.comm.watch import naming
from dryvine.comm.wire import P2PWire, Wire


@dataclass(frozen=True)
class ByPeer:
    """A `Wire` that has one for the peers in `near`, and one for the others."""

    near: frozenset[int]
    inside: Wire
    outside: Wire

    def send(self, tensors: tuple[Tensor, ...], target: int, channel: Channel, label: str = "") -> Pending[None]:
        return self._wire(target).send(tensors, target, channel, label)

    def receive(
        self, like: tuple[Tensor, ...], source: int, channel: Channel, label: str = ""
    ) -> Pending[tuple[Tensor, ...]]:
        return self._wire(source).receive(like, source, channel, label)

    def _wire(self, peer: int) -> Wire:
        return self.inside if peer in self.near else self.outside


def make_wire(
    mesh: Mesh, topology: Topology | None, slots: Mapping[Line, int], like: tuple[Tensor, ...]
) -> tuple[Wire, str]:
    """This rank's wire, and a line that says what carries messages. `slots` are those of each line of a pipeline
    (`flow_control.slots_by_line`), `like` the largest message, `topology` the world's (None: one node). Collective.

    When it returns, every communicator that messages will use is connected.
    """
    if mesh.pp == 1 or mesh.device.type == "cpu":
        return P2PWire(mesh), "gloo"
    families = _families(mesh, topology or by_sizes([mesh.size]))
    groups = mesh.new_groups(families)
    (family,) = (family for family in families if mesh.rank in family)
    near = tuple(rank // mesh.data_ranks for rank in family)
    inside = _copy_wire(mesh, near, groups[family], slots, slot_bytes(like)) if len(near) > 1 else None
    by_copy = frozenset(near) if inside else frozenset[int]()
    connect(mesh, [line for line in slots if not by_copy >= {line.source, line.target}])
    outside = P2PWire(mesh)
    if inside is None:
        why = "no memory that the node's GPUs could share" if len(near) > 1 else "no stage shares a node with the next"
        return outside, f"NCCL: {why}"
    between = ", NCCL between nodes" if len(near) < mesh.pp else ""
    return ByPeer(by_copy, inside, outside), f"copy engines inside a node{between}"


def _families(mesh: Mesh, topology: Topology) -> list[tuple[int, ...]]:
    """The world ranks of each pipeline that share a node, for all pipelines."""
    families: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for rank in range(mesh.size):
        families[rank % mesh.data_ranks, topology.node_of(rank)].append(rank)
    return [tuple(ranks) for ranks in families.values()]


def _copy_wire(
    mesh: Mesh,
    near: tuple[int, ...],
    group: dist.ProcessGroup,
    slots: Mapping[Line, int],
    size: int,
) -> CopyWire | None:
    inside = {line: count for line, count in slots.items() if line.source in near and line.target in near}
    rings, memory = layout_rings(inside, size)
    links = open_links(near, group, memory, 2 * len(rings), mesh.device)
    if links is None:
        return None
    return CopyWire(mesh.pp_rank, links, rings, size, expecting(mesh.watch, links.words), mesh.global_rank)


def connect(mesh: Mesh, lines: Iterable[Line]) -> None:
    """Send one element along each line of this rank's pipeline, one line after the other in one order on all ranks."""
    element = torch.zeros(1, device=mesh.device)
    for source, target, channel in connection_order(lines):
        if mesh.pp_rank not in (source, target):
            continue
        group, peer = mesh.channels[channel, target > source], mesh.global_rank(source + target - mesh.pp_rank)
        with naming(mesh.watch, f"connecting to rank {peer}", ((peer, 0),), on_device=mesh.device.type == "cuda"):
            if mesh.pp_rank == source:
                dist.send(element, peer, group=group)
            else:
                dist.recv(element, peer, group=group)


def connection_order(lines: Iterable[Line]) -> list[Line]:
    """The lines in an order that is the same on all ranks. Any such order works: both ranks of the first unconnected
    line are always on their way to it."""
    return sorted(lines)
