"""Bin packing of documents into rows of one size: best fit decreasing, which needs at most 11/9 of the optimal number
of rows. The row with the tightest room is found by bisection, so a million documents take seconds."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple


class Fitted(NamedTuple):
    """The row that a document is in, and its first position there."""

    row: int
    start: int


def fit(sizes: Sequence[int], room: int) -> list[Fitted]:
    """A place for each document, in rows of `room` tokens, none of which is larger."""
    found: dict[int, Fitted] = {}
    rows_by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of `rows_by_room`, ascending
    rows = 0
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[number]
        at = bisect.bisect_left(rooms, size)
        left = rooms[at] if at < len(rooms) else room
        if at < len(rooms):
            row = rows_by_room[left].pop()
            if not rows_by_room[left]:
                del rows_by_room[left], rooms[at]
        else:
            row, rows = rows, rows + 1
        found[number] = Fitted(row, room - left)
        if left - size not in rows_by_room:
            bisect.insort(rooms, left - size)
        rows_by_room[left - size].append(row)
    return [found[number] for number in range(len(sizes))]
