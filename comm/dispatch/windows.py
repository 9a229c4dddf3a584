"""Rows of every rank of a group in the memory of every other: how `nvlink` moves them, by copy engines.

Each rank has a few slots, and in a slot a window for each source, in which that rank writes. Message n uses slot
n mod slots, on all ranks alike, and is the turn-th in it:

    source  wait until all targets have read the slot's message before; to each, copy into its window; flag = turn + 1
    target  wait until the flags of all sources are turn + 1; read; tell every source that it has

Waits and flags are queued on streams (`stream_values`), so no host waits, and no SM is taken: NCCL's all-to-all takes
16 for as long as it runs. A flag and a word of credit for each slot, and not one count for all, allow results to be
waited for in another order than they were started.

A step has hundreds of messages, and what each costs is calls of the driver, so they are few: two to queue behind the
caller, one for all credits that are waited for, a copy for each tensor and a flag for each peer, one for all flags that
are waited for, and one for all credits that are given. One queue serves all peers: a copy engine fills the links of a
GPU by itself, and all peers share them. Own rows are not copied (`by_rank`). Flags are words that all ranks see, so the
same wait also says that what this rank sent has left. (There were 20 calls a message before, and 5 messages a layer.)

While ops are recorded (`live_steps`), a message gets its slot, where graphs will read and write, and is sent at each
replay with the slot's turn of that moment. Its n is its place in its op, not in time: a rank whose documents outgrow
its graphs records them anew while the others replay theirs, and all must mean the same slot. The transfers could be
nodes of the graph: driver calls on a stream that records become such. But the words they wait for would then be
constants, so they would have to be reset in each replay by their reader, and waits for different turns could not be
told apart by the host, which names what is late; and ops of a pair that take turns are cut at their messages anyhow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dryvine.comm.copy_wire import ALIGNMENT, Expect, Links
from dryvine.comm.dispatch.backends import WINDOW_SLOTS
from dryvine.comm.dispatch.by_rank import ByRank
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
    size: int  # bytes of each source at most
    copies: dict[int, list[tuple[Tensor, Tensor]]]  # to each peer: (where to, what), held until they are done
    sent: Counter[LinkClass]  # bytes
    recorded: bool
    turn: int = 0  # how many messages have used the slot before


class _SlotWords(NamedTuple):
    """Words of a slot, for all peers at once."""

    free: tuple[int, ...]  # credits of what goes to them
    done: tuple[int, ...]  # flags of what comes from them and of what goes to them
    read: tuple[int, ...]  # credits of what comes from them


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
        # Each starts with another, so that not all send to one.
        self._peers = [(rank + 1 + n) % self.ranks for n in range(self.ranks - 1)]
        self._queue = links.queue()
        self._words = [self._words_of(slot) for slot in range(WINDOW_SLOTS)]
        self._messages = 0
        self._turns = [0] * WINDOW_SLOTS

    @property
    def ranks(self) -> int:
        return len(self.classes)

    def start(
        self,
        sent: Callable[[int], tuple[Tensor, ...]],
        rooms: tuple[WindowRows, ...],
        read: Callable[[list[ByRank]], T],
        what: str,
    ) -> Pending[T]:
        """Copy the contiguous tensors `sent(rank)` ([n <= rows, *tail] each) to every rank. The result is what `read`
        makes, in memory of its own, of what comes from all ranks, for each room. Raises ValueError if the rooms are
        larger than a slot. Collective and in one order on all ranks, like the calls of a dispatcher."""
        needed = sum(room.bytes(self.ranks) for room in rooms)
        if needed > self.slot_bytes:
            raise ValueError(f"{what}: takes {needed} bytes of a slot of {self.slot_bytes}")
        slot = self._next_slot()
        own, message = sent(self.rank), self._message(sent, rooms, slot, what)
        self.live.run(LiveStep(lambda: self._post(message)))

        def finish() -> T:
            self.live.run(LiveStep(lambda: self._wait(message), waits=True))
            views = self._views(self.rank, rooms, slot)
            result = read([ByRank(view, mine, self.rank) for view, mine in zip(views, own, strict=True)])
            self.live.soon(LiveStep(lambda: self._release(message)))
            return result

        return Pending(finish, lambda: self._arrived(message))

    def _next_slot(self) -> int:
        if self.live.recording:
            number, self.live.number = self.live.number, self.live.number + 1
        else:
            number, self._messages = self._messages, self._messages + 1
        return number % WINDOW_SLOTS

    def _message(
        self, sent: Callable[[int], tuple[Tensor, ...]], rooms: tuple[WindowRows, ...], slot: int, what: str
    ) -> _Message:
        copies, bytes_sent = {}, Counter[LinkClass]()
        for rank in (*self._peers, self.rank):
            tensors = sent(rank)
            bytes_sent[self.classes[rank]] += sum(tensor.nbytes for tensor in tensors)
            if rank != self.rank:
                views = self._views(rank, rooms, slot)
                copies[rank] = [(v[self.rank, : len(t)], t) for v, t in zip(views, tensors, strict=True)]
        size = sum(room.rows * room.row_bytes for room in rooms)
        return _Message(what, slot, size, copies, bytes_sent, self.live.recording)

    def _post(self, message: _Message) -> None:
        slot, queue = message.slot, self._queue
        message.turn, self._turns[slot] = self._turns[slot], self._turns[slot] + 1
        queue.after_caller()
        queue.wait(self._words[slot].free, message.turn)
        for peer, copies in message.copies.items():
            for window, rows in copies:
                queue.copy(window, rows)
            queue.write((self._flag(slot, self.rank, peer),), message.turn + 1)
        self.meter.put(message.sent)
        for source in self._peers:
            # Each by itself, so that the one that is late is named.
            arrived = partial(self.links.words.reached, self._flag(slot, source, self.rank), message.turn + 1)
            self.expect(message.what + self.live.during, ((self.world_ranks[source], message.size),), arrived)

    def _arrived(self, message: _Message) -> bool:
        return all(self.links.words.reached(flag, message.turn + 1) for flag in self._words[message.slot].done)

    def _wait(self, message: _Message) -> None:
        """For what comes, and for what was sent to have left: afterwards its memory may be given to others."""
        self.links.caller().wait(self._words[message.slot].done, message.turn + 1)
        if not message.recorded:
            message.copies.clear()

    def _release(self, message: _Message) -> None:
        """The slot to its sources."""
        self.links.caller().write(self._words[message.slot].read, message.turn + 1)

    def _views(self, rank: int, rooms: tuple[WindowRows, ...], slot: int) -> list[Tensor]:
        """The windows of all sources in a rank's slot."""
        start, views = slot * self.slot_bytes, []
        for room in rooms:
            views.append(room.view(self.links.memory(rank), start, self.ranks))
            start += room.bytes(self.ranks)
        return views

    def _words_of(self, slot: int) -> _SlotWords:
        to, come = ([(self.rank, peer) for peer in self._peers], [(peer, self.rank) for peer in self._peers])
        return _SlotWords(
            free=tuple(self._credit(slot, *pair) for pair in to),
            done=tuple(self._flag(slot, *pair) for pair in (*come, *to)),
            read=tuple(self._credit(slot, *pair) for pair in come),
        )

    def _flag(self, slot: int, source: int, target: int) -> int:
        return 2 * ((slot * self.ranks + source) * self.ranks + target)

    def _credit(self, slot: int, source: int, target: int) -> int:
        return self._flag(slot, source, target) + 1
