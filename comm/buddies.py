"""Who keeps a copy of a rank's state in the memory of another node, and how it gets there.

A rank's buddy is the rank on its rail of the next node, the last node's of the first, so that bytes spread evenly over
nodes and network cards. Files travel over gloo, in groups of their own: a thread sends them while steps go on, and its
messages must not meet theirs.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.groups import new_groups
from dryvine.comm.topology import Topology, buddy_of, wards_of

CHUNK = 1 << 26  # bytes of a message


@dataclass(frozen=True)
class BuddyLinks:
    """This rank's: to `buddy` it sends, from `clients` it receives. World ranks."""

    group: dist.ProcessGroup
    buddy: int
    clients: tuple[int, ...]

    def tell(self, own: Sequence[int]) -> dict[int, list[int]]:
        """Send numbers to the buddy. Returns those of each client, as many. Collective over the group."""
        numbers = {client: torch.zeros(len(own), dtype=torch.int64) for client in self.clients}
        _swap({self.buddy: [torch.tensor(own)]}, {client: [of] for client, of in numbers.items()}, self.group)
        return {client: of.tolist() for client, of in numbers.items()}

    def answer(self, to: Mapping[int, bool]) -> bool:
        """Tell every client yes or no. Returns what the buddy says. Collective over the group."""
        said = torch.zeros(1, dtype=torch.int64)
        _swap({client: [torch.tensor([int(to[client])])] for client in self.clients}, {self.buddy: [said]}, self.group)
        return bool(said)

    def swap(self, sent: Sequence[Path], arriving: Mapping[int, Sequence[Path]]) -> None:
        """Send files to the buddy, and fill those that clients send. Collective over the group."""
        swap_files({self.buddy: sent}, arriving, self.group)


def swap_files(
    sent: Mapping[int, Sequence[Path]], arriving: Mapping[int, Sequence[Path]], group: dist.ProcessGroup | None = None
) -> None:
    """Send files to ranks of `group`, None being the world, and fill others, which have their size already, with what
    ranks send. Returns when all have travelled."""
    leaving, coming = ({rank: _chunks(paths) for rank, paths in of.items()} for of in (sent, arriving))
    _swap(leaving, coming, group)


def _swap(
    sent: Mapping[int, Iterable[Tensor]], arriving: Mapping[int, Iterable[Tensor]], group: dist.ProcessGroup | None
) -> None:
    """The same with tensors, on the CPU."""
    works = [dist.irecv(part, rank, group) for rank, parts in arriving.items() for part in parts]
    works += [dist.isend(part, rank, group) for rank, parts in sent.items() for part in parts]
    for work in works:
        if work is not None:
            work.wait()


def make_links(topology: Topology, rank: int, timeout: timedelta) -> BuddyLinks | None:
    """Those of a rank; None where there is one node. Collective over the world."""
    if len(topology.nodes) == 1:
        return None
    groups = new_groups(topology.rails(), timeout, backend="gloo")
    ranks = next(ranks for ranks in groups)
    return BuddyLinks(groups[ranks], buddy_of(topology, rank), wards_of(topology, rank))


def allocate(path: Path, size: int) -> None:
    """A new file of so many bytes, all of its memory taken: a write to a file with holes in a full /dev/shm would end
    the process. Raises OSError."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _chunks(paths: Iterable[Path]) -> list[Tensor]:
    """The bytes of files, live: what is written to them is in the file."""
    chunks: list[Tensor] = []
    for path in paths:
        with path.open("r+b") as file:
            chunks += torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8).split(CHUNK)
    return chunks
