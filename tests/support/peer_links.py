"""Copy engines between two ranks on simulated streams (`support.races`): the other rank, and queues to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from dryvine.comm.pending import Pending
from tests.support.races import Event, Races, Slots, StreamQueue


class PeerLinks(ABC):
    """`Links` of rank 0 to rank 1, which does its part as soon as it may, on a stream of its own. `names` are those of
    the streams of its queues."""

    words: Any = SimpleNamespace(reached=print)  # never called

    def __init__(self, races: Races, *names: str) -> None:
        self.races, self.peer, self.names = races, races.stream("peer"), iter(names)
        self.memories = [Slots(races), Slots(races)]
        self.writes: dict[tuple[int, int], Event] = {}  # (word, value) -> when it was written

    def memory(self, rank: int) -> Any:
        return self.memories[rank]

    def queue(self) -> PeerQueue:
        return PeerQueue(self, self.races.stream(next(self.names)))

    def caller(self) -> PeerQueue:
        return PeerQueue(self, self.races.here)

    @abstractmethod
    def reached(self, word: int, value: int) -> Event:
        """When a word has this value."""


class PeerQueue(StreamQueue[PeerLinks]):
    def wait(self, words: Sequence[int], value: int) -> None:
        for word in words if value else ():
            self.stream.wait_event(self.links.reached(word, value))

    def look(self, words: Sequence[int], value: int) -> None:
        """`wait`, as if the words were there: the peer works all the same."""
        for word in words if value else ():
            self.links.reached(word, value)

    def here(self) -> Pending[None]:
        event = self.stream.record_event()
        return Pending(lambda: self.links.races.here.wait_event(event))
