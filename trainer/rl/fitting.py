"""Bin packing of documents into rows of one size, by best fit: in descending order of sizes that needs at most 11/9 of
the optimal number of rows. The row with the tightest room is found by bisection, so a million documents take
seconds."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple


class Fitted(NamedTuple):
    """The row that a document is in, and its first position there."""

    row: int
    start: int


class OpenRows:
    """Rows of `length` tokens that are filled from the left."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.room: list[int] = []  # by row
        self._rows_by_room: defaultdict[int, list[int]] = defaultdict(list)
        self._rooms: list[int] = []  # the keys of `_rows_by_room`, ascending

    def tightest(self, size: int) -> int:
        """The row with the least room that is enough; a new one if there is none."""
        at = bisect.bisect_left(self._rooms, size)
        if at < len(self._rooms):
            return self._rows_by_room[self._rooms[at]][-1]
        return self.new()

    def new(self) -> int:
        """An empty row."""
        self.room.append(self._length)
        self._keep(len(self.room) - 1)
        return len(self.room) - 1

    def take(self, row: int, size: int) -> Fitted:
        """Use `size` tokens of a row."""
        left = self.room[row]
        self._rows_by_room[left].remove(row)
        if not self._rows_by_room[left]:
            del self._rows_by_room[left]
            self._rooms.remove(left)
        self.room[row] = left - size
        self._keep(row)
        return Fitted(row, self._length - left)

    def _keep(self, row: int) -> None:
        room = self.room[row]
        if room not in self._rows_by_room:
            bisect.insort(self._rooms, room)
        self._rows_by_room[room].append(row)


def fit(sizes: Sequence[int], room: int) -> list[Fitted]:
    """A place for each document, in rows of `room` tokens, none of which is larger."""
    rows, found = OpenRows(room), dict[int, Fitted]()
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[number] = rows.take(rows.tightest(sizes[number]), sizes[number])
    return [found[number] for number in range(len(sizes))]
