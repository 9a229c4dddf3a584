"""The all-to-all of a node by copy engine: hop 2 of two hops where GPUs can open their memory to each other.

It is an `Exchange`, so the two hops are the same code, rows and sums with it as with torch's all-to-all. What it saves
is SMs: NCCL's takes 16 for as long as it runs, and its copies run beside the GEMMs of the other half of a pair.

Each pair of ranks has a ring of few slots in the target's memory. Rows go in pieces of at most a slot, and piece n of a
pair uses slot n mod slots, for the turn-th time:

    source  wait until the target has emptied the slot; copy the piece into it; flag = turn + 1
    target  wait until the flag is turn + 1; copy the piece to its place; credit = turn + 1

Both sides are queued at the start on a stream of their own (writing, reading), so a ring that is smaller than the rows
stops neither the caller nor a later hop 1, and its size depends on nothing but the node: any routing passes, however
uneven. Rows written at once to their final place would save the second copy (0.67 ms for a GB, on the GPU's own memory)
and need slots for the worst routing, or a second path for what does not fit: with 8 nodes of 8 up to 3.8 GB a slot at
4096 x 7168 BF16, where the rings have 0.26 GB.

All ranks start their exchanges in one order, and pieces go round over peers, so no wait is for something that is queued
behind it: it blocks no more than collectives do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from dryvine.comm.copy_links import expecting, open_links
from dryvine.comm.copy_wire import Expect, Links
from dryvine.comm.dispatch.backends import RING_SLOTS, piece_bytes, ring_bytes
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.pending import Pending
from dryvine.comm.topology import LinkClass


def open_exchange(group: dist.ProcessGroup, classes: Sequence[LinkClass], setup: Setup) -> CopyExchange | None:
    """Over the ranks of `group`, which share a node; None on all of them where they cannot open their memory to each
    other. Collective over the group."""
    mesh, ranks = setup.mesh, group.size()
    assert mesh is not None
    sizes = setup.row_bytes, setup.top_k, setup.tokens
    links = open_links(tuple(range(ranks)), group, ring_bytes(ranks, *sizes), word_count(ranks), mesh.device)
    if links is None:
        return None
    expect, world = expecting(mesh.watch, links.words), dist.get_process_group_ranks(group)
    return CopyExchange(group.rank(), links, piece_bytes(*sizes), setup.meter, classes, expect, world)


def word_count(ranks: int) -> int:
    return 2 * RING_SLOTS * ranks * ranks


class SlotFill(NamedTuple):
    """Rows of one pair of ranks that go through a slot at once."""

    peer: int
    rows: Tensor
    slot: int
    turn: int  # how many pieces have used the slot before


class CopyExchange:
    """An `Exchange` of rank `rank`. `classes` are the links to each rank, for the meter; `expect` and `world_ranks` as
    in `Windows`. A slot holds a piece of `piece` bytes."""

    def __init__(
        self,
        rank: int,
        links: Links,
        piece: int,
        meter: Meter,
        classes: Sequence[LinkClass],
        expect: Expect,
        world_ranks: Sequence[int],
    ) -> None:
        self.rank, self.links, self.piece, self.meter = rank, links, piece, meter
        self.classes, self.expect, self.world_ranks = classes, expect, world_ranks
        # Each starts with another, so that not all send to one.
        self._targets = [(rank + 1 + n) % self.size for n in range(self.size - 1)]
        self._writing, self._reading = links.queue(), links.queue()
        self._sent, self._came = Counter[int](), Counter[int]()  # pieces, by peer

    @property
    def size(self) -> int:
        return len(self.classes)

    def start(
        self, rows: Tensor, sends: Sequence[int], receives: Sequence[int], into: Tensor | None = None, what: str = ""
    ) -> Pending[Tensor]:
        self.meter.add(self.classes, sends, rows[:1].nbytes)
        rows = rows.contiguous()
        arrived = rows.new_empty((sum(receives), *rows.shape[1:])) if into is None else into
        here, places = rows.split(list(sends)), arrived.split(list(receives))
        places[self.rank].copy_(here[self.rank])
        done = self._write(here) | self._read(places)
        due = tuple((self.world_ranks[peer], places[peer].nbytes) for peer in self._targets)
        self.expect(what, due, lambda: self._reached(done))
        sent, read = self._writing.here(), self._reading.here()

        def finish() -> Tensor:
            sent.wait()
            read.wait()
            rows.size()  # the closure holds what is being sent until it has left
            return arrived

        return Pending(finish, lambda: self._reached(done))

    def _write(self, here: Sequence[Tensor]) -> dict[int, int]:
        """Queue this rank's pieces. Returns the words that say that they have left, with their values."""
        self._writing.after_caller()
        left = {}
        for peer, rows, slot, turn in self._pieces(here, self._targets, self._sent):
            flag = self._flag(slot, self.rank, peer)
            self._writing.wait((flag + 1,), turn)
            self._writing.copy(self._window(peer, self.rank, slot, rows), rows)
            self._writing.write((flag,), turn + 1)
            left[flag] = turn + 1
        return left

    def _read(self, places: Sequence[Tensor]) -> dict[int, int]:
        """Queue the pieces that come to `places`. Returns the words that say that they are there, with their values."""
        self._reading.after_caller()
        come = {}
        # Those first that write to this rank first.
        for peer, rows, slot, turn in self._pieces(places, self._targets[::-1], self._came):
            flag = self._flag(slot, peer, self.rank)
            self._reading.wait((flag,), turn + 1)
            self._reading.copy(rows, self._window(self.rank, peer, slot, rows))
            self._reading.write((flag + 1,), turn + 1)
            come[flag + 1] = turn + 1
        return come

    def _pieces(self, parts: Sequence[Tensor], peers: Sequence[int], numbers: Counter[int]) -> Iterator[SlotFill]:
        """The first piece of each peer, then the second of each, ...; `parts` are by rank."""
        cut = [[(peer, piece) for piece in self._cut(parts[peer])] for peer in peers]
        for some in zip_longest(*cut):
            for peer, rows in filter(None, some):
                turn, slot = divmod(numbers[peer], RING_SLOTS)
                numbers[peer] += 1
                yield SlotFill(peer, rows, slot, turn)

    def _cut(self, rows: Tensor) -> Sequence[Tensor]:
        """Source and target cut alike: by rows of one size and slots of one size."""
        if not len(rows):
            return ()
        most = self.piece // rows[0].nbytes
        if most == 0:
            raise ValueError(f"a row of {rows[0].nbytes} bytes does not fit a slot of {self.piece}")
        return rows.split(most)

    def _window(self, target: int, source: int, slot: int, rows: Tensor) -> Tensor:
        """Where rows of this shape lie in a slot."""
        start = (source * RING_SLOTS + slot) * self.piece
        return self.links.memory(target)[start : start + rows.nbytes].view(rows.dtype).view(rows.shape)

    def _reached(self, words: dict[int, int]) -> bool:
        return all(self.links.words.reached(word, value) for word, value in words.items())

    def _flag(self, slot: int, source: int, target: int) -> int:
        """Its word; the next one is the credit."""
        return 2 * ((slot * self.size + source) * self.size + target)
