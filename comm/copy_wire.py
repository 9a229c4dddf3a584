"""Stage-to-stage messages inside a node by copy engine: no SM, no kernel that spins, no communicator to connect.

Each line (a channel from one rank to another) has a ring of slots in its receiver's memory, which the sender can write.
Message n goes into slot n mod slots, in the order of the sender's queue for this line:

    sender    wait until credit >= n - slots + 1; copy into the slot; flag = n + 1
    receiver  wait until flag >= n + 1; copy out of the slot; credit = n + 1

The waits and writes are queued, so no host waits. Flag and credit lie in host memory that the node's ranks share
(`words`). Each line has a queue of its own: a line without credit must not hold up another. The copy out of the slot
costs 2/3 of a millisecond per GB and makes the receiver's tensor an ordinary one, free to be kept as long as its
flight lives; a slot that is read in place would be blocked as long, and the ring longer by the flights of a stage.

NCCL in its place (`P2PWire`): a receive that is posted early spins on its SMs until the message comes, and a kernel
that is loaded meanwhile waits for the device, and so for the peer: two ranks that do so wait for each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dryvine.comm.integers import round_up
from dryvine.comm.lines import Channel, Line
from dryvine.comm.pending import Pending
from dryvine.comm.wire import describe
from dryvine.comm.words import Words

ALIGNMENT = 256  # bytes, of each tensor in a slot
# Notes what is awaited, for the deadline: (what, ((world rank, bytes),), whether it has come).
Expect = Callable[[str, tuple[tuple[int, int], ...], Callable[[], bool]], object]


class Queue(Protocol):
    """Work in order beside its caller: a stream on a GPU."""

    def after_caller(self) -> None:
        """What is queued from now on starts after all that the caller has queued on its own stream."""
        ...

    def wait(self, words: Sequence[int], value: int) -> None:
        """What is queued from now on starts once each of the words is at least `value`."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Of the same shape and dtype. Both are held by the caller until this has been done."""
        ...

    def write(self, words: Sequence[int], value: int) -> None:
        """Set all of the words, once what is queued so far is done and visible to all."""
        ...

    def here(self) -> Pending[None]:
        """This point of the queue; waiting for it makes the caller's stream wait."""
        ...


class Links(Protocol):
    """Memory of the ranks of one pipeline in one node, as this rank reaches it."""

    words: Words

    def memory(self, rank: int) -> Tensor:
        """The uint8 memory of pipeline rank `rank`, equally large on all ranks."""
        ...

    def queue(self) -> Queue:
        """A queue of its own."""
        ...

    def caller(self) -> Queue:
        """The caller's own stream."""
        ...


@dataclass(frozen=True)
class Ring:
    """Where a line's slots lie in its receiver's memory, and which words are its flag and credit."""

    start: int  # byte of the first slot
    slots: int
    flag: int
    credit: int


def layout_rings(slots: Mapping[Line, int], slot_bytes: int) -> tuple[dict[Line, Ring], int]:
    """A ring for every line, the same on all ranks of a pipeline, and the bytes that each rank's memory needs."""
    rings: dict[Line, Ring] = {}
    used: Counter[int] = Counter()
    for number, line in enumerate(sorted(slots)):
        rings[line] = Ring(used[line.target], slots[line], 2 * number, 2 * number + 1)
        used[line.target] += slots[line] * slot_bytes
    return rings, max(used.values(), default=0)


def slot_bytes(tensors: tuple[Tensor, ...]) -> int:
    """Bytes of a slot that holds these tensors."""
    return sum(round_up(tensor.nbytes, ALIGNMENT) for tensor in tensors)


class CopyWire:
    """A `Wire` between the ranks of one pipeline that share a node. `expect` notes what is awaited, for the deadline:
    (what, ((world rank, bytes),), whether it is done); `world_rank` numbers pipeline ranks as the world does."""

    def __init__(
        self,
        rank: int,
        links: Links,
        rings: Mapping[Line, Ring],
        slot_bytes: int,
        expect: Expect,
        world_rank: Callable[[int], int],
    ) -> None:
        self.rank, self.links, self.rings, self.slot_bytes = rank, links, rings, slot_bytes
        self.expect, self.world_rank = expect, world_rank
        self._queues = {line: links.queue() for line in rings if line.source == rank}
        self._numbers: Counter[tuple[Line, str]] = Counter()  # of messages, by line, sent and received

    def send(self, tensors: tuple[Tensor, ...], target: int, channel: Channel, label: str = "") -> Pending[None]:
        line = Line(self.rank, target, channel)
        ring, queue, number = self.rings[line], self._queues[line], self._next(line, "sent")
        queue.after_caller()
        queue.wait((ring.credit,), number - ring.slots + 1)
        for part, tensor in zip(self._parts(line, number, tensors), tensors, strict=True):
            queue.copy(part, tensor)
        queue.write((ring.flag,), number + 1)
        self._note(f"sending {describe(channel, label)} to", ring.flag, number, target, 0)
        copied = queue.here()
        # The tensors are held until they are copied: their memory may not be given to others before.
        return Pending(lambda held=tensors: copied.wait(), copied.ready)  # type: ignore[misc]

    def receive(
        self, like: tuple[Tensor, ...], source: int, channel: Channel, label: str = ""
    ) -> Pending[tuple[Tensor, ...]]:
        line = Line(source, self.rank, channel)
        ring, number = self.rings[line], self._next(line, "received")
        size = sum(tensor.nbytes for tensor in like)
        self._note(f"receiving {describe(channel, label)} from", ring.credit, number, source, size)

        def finish() -> tuple[Tensor, ...]:
            caller = self.links.caller()
            caller.wait((ring.flag,), number + 1)
            parts = self._parts(line, number, like)
            tensors = tuple(torch.empty_like(part) for part in parts)
            for tensor, part in zip(tensors, parts, strict=True):
                caller.copy(tensor, part)
            caller.write((ring.credit,), number + 1)
            return tensors

        return Pending(finish)

    def _next(self, line: Line, way: str) -> int:
        self._numbers[line, way] += 1
        return self._numbers[line, way] - 1

    def _parts(self, line: Line, number: int, like: tuple[Tensor, ...]) -> list[Tensor]:
        """Where the tensors of message `number` lie in its slot, in their shapes and dtypes."""
        ring, parts = self.rings[line], []
        start = ring.start + number % ring.slots * self.slot_bytes
        memory = self.links.memory(line.target)
        for tensor in like:
            parts.append(memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            start += round_up(tensor.nbytes, ALIGNMENT)
        return parts

    def _note(self, what: str, word: int, number: int, peer: int, size: int) -> None:
        rank = self.world_rank(peer)
        self.expect(f"{what} rank {rank}", ((rank, size),), lambda: self.links.words.reached(word, number + 1))
