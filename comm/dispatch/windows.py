"""Rows of every rank of a group in the memory of every other: how `nvlink` moves them, by copy engines.

Each rank has a few slots, and in a slot a window for each source, in which that rank writes. Message n uses slot
n mod slots, on all ranks alike, and is the turn-th in it:

    source  wait until the target has read the slot's message before; copy into its window; flag = turn + 1
    target  wait until the flags of all sources are turn + 1; read; tell every source that it has

Waits and flags are queued on streams (`stream_values`), so no host waits, and no SM is taken: NCCL's all-to-all takes
16 for as long as it runs. A flag and a word of credit for each slot, and not one count for all, allow results to be
waited for in another order than they were started.

While ops are recorded (`live_steps`), a message gets its slot, where graphs will read and write, and is sent at each
replay with the slot's turn of that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from dryvine.comm.copy_wire import ALIGNMENT, Expect, Links, Queue
from dryvine.comm.dispatch.backends import WINDOW_SLOTS
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.integers import round_up
from dryvine.comm.live_steps import LiveStep, LiveSteps
from dryvine.comm.pending import Pending
from dryvine.comm.topology import LinkClass

T = TypeVar("T")


@dataclass(frozen=True)
class WindowRows:
    """What one tensor takes in a window: at most `rows` rows of this shape."""

    rows: int
    tail: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor, rows: int) -> WindowRows:
        return WindowRows(rows, tuple(tensor.shape[1:]), tensor.dtype)

    @property
    def row_bytes(self) -> int:
        return prod(self.tail) * self.dtype.itemsize

    def view(self, memory: Tensor, start: int, sources: int) -> Tensor:
        """[sources, rows, *tail], from byte `start` on."""
        end = start + sources * self.rows * self.row_bytes
        return memory[start:end].view(self.dtype).view(sources, self.rows, *self.tail)

    def bytes(self, sources: int) -> int:
        return round_up(sources * self.rows * self.row_bytes, ALIGNMENT)


def word_count(ranks: int) -> int:
    return 2 * WINDOW_SLOTS * ranks * ranks


@dataclass
class _Message:
    """One message, or, where it was recorded, all that are sent in its place at the replays."""

    what: str
    slot: int
    sent: list[tuple[Tensor, ...]]  # by target; held until it has left
    rooms: tuple[WindowRows, ...]
    recorded: bool
    turn: int = 0  # how many messages have used the slot before
    copied: list[Pending[None]] = field(default_factory=list)  # by target


class Windows:
    """Those of rank `rank` of `ranks`. `expect` notes what is awaited, for the deadline: (what, ((world rank, bytes),),
    whether it has come). `classes` are the links to each rank, for the meter."""

    def __init__(
        self,
        rank: int,
        links: Links,
        slot_bytes: int,
        meter: Meter,
        classes: Sequence[LinkClass],
        expect: Expect,
        world_ranks: Sequence[int],
    ) -> None:
        self.rank, self.links, self.slot_bytes, self.meter = rank, links, slot_bytes, meter
        self.classes, self.expect, self.world_ranks = classes, expect, world_ranks
        self.live = LiveSteps()  # of its messages, for whoever records ops
        self._queues: list[Queue] = [links.queue() for _ in classes]
        self._messages = 0
        self._turns = [0] * WINDOW_SLOTS

    @property
    def ranks(self) -> int:
        return len(self.classes)

    def start(
        self,
        sent: Callable[[int], tuple[Tensor, ...]],
        rooms: tuple[WindowRows, ...],
        read: Callable[[list[Tensor]], T],
        what: str,
    ) -> Pending[T]:
        """Copy the tensors `sent(rank)` ([n <= rows, *tail] each) to every rank. The result is what `read` makes, in
        memory of its own, of what comes from all ranks: a tensor [ranks, rows, *tail] for each room. What lies behind
        the n rows that a source sent is old. Raises ValueError if the rooms are larger than a slot. Collective and in
        one order on all ranks, like the calls of a dispatcher."""
        needed = sum(room.bytes(self.ranks) for room in rooms)
        if needed > self.slot_bytes:
            raise ValueError(f"{what}: takes {needed} bytes of a slot of {self.slot_bytes}")
        slot, self._messages = self._messages % WINDOW_SLOTS, self._messages + 1
        message = _Message(what, slot, [sent(rank) for rank in range(self.ranks)], rooms, self.live.recording)
        self.live.run(LiveStep(lambda: self._post(message)))

        def finish() -> T:
            self.live.run(LiveStep(lambda: self._wait(message), waits=True))
            result = read(self._views(self.rank, rooms, slot))
            self.live.run(LiveStep(lambda: self._release(message)))
            return result

        return Pending(finish, lambda: self._arrived(message))

    def _post(self, message: _Message) -> None:
        slot, turn = message.slot, self._turns[message.slot]
        self._turns[slot] += 1
        message.turn = turn
        for rank, tensors in enumerate(message.sent):
            self._put(rank, tensors, message)
        message.copied = [queue.here() for queue in self._queues]
        reached, size = self.links.words.reached, sum(room.rows * room.row_bytes for room in message.rooms)
        for source in range(self.ranks):
            if source != self.rank:
                # Each by itself, so that the one that is late is named.
                flag, due = self._flag(slot, source, self.rank), ((self.world_ranks[source], size),)
                self.expect(message.what + self.live.during, due, partial(reached, flag, turn + 1))

    def _put(self, target: int, tensors: tuple[Tensor, ...], message: _Message) -> None:
        slot, turn, queue = message.slot, message.turn, self._queues[target]
        queue.after_caller()
        queue.wait(self._credit(slot, self.rank, target), turn)
        for tensor, view in zip(tensors, self._views(target, message.rooms, slot), strict=True):
            queue.copy(view[self.rank, : len(tensor)], tensor)
            self.meter.add([self.classes[target]], [len(tensor)], prod(tensor.shape[1:]) * tensor.element_size())
        queue.write(self._flag(slot, self.rank, target), turn + 1)

    def _arrived(self, message: _Message) -> bool:
        reached, turn = self.links.words.reached, message.turn
        return all(reached(self._flag(message.slot, source, self.rank), turn + 1) for source in range(self.ranks))

    def _wait(self, message: _Message) -> None:
        caller = self.links.caller()
        for source in range(self.ranks):
            caller.wait(self._flag(message.slot, source, self.rank), message.turn + 1)

    def _release(self, message: _Message) -> None:
        """The slot to its sources, and what was sent to its owner: its memory may not be given to others before."""
        caller = self.links.caller()
        for source in range(self.ranks):
            caller.write(self._credit(message.slot, source, self.rank), message.turn + 1)
        for queue in message.copied:
            queue.wait()
        message.copied.clear()
        if not message.recorded:
            message.sent.clear()

    def _views(self, rank: int, rooms: tuple[WindowRows, ...], slot: int) -> list[Tensor]:
        """The windows of all sources in a rank's slot."""
        start, views = slot * self.slot_bytes, []
        for room in rooms:
            views.append(room.view(self.links.memory(rank), start, self.ranks))
            start += room.bytes(self.ranks)
        return views

    def _flag(self, slot: int, source: int, target: int) -> int:
        return 2 * ((slot * self.ranks + source) * self.ranks + target)

    def _credit(self, slot: int, source: int, target: int) -> int:
        return self._flag(slot, source, target) + 1
