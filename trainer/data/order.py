"""The order of a run's windows: a pure function of (seed, number), with no table.

A shuffled index of billions of windows costs gigabytes on every rank and has to be saved, or remade, to resume. A
keyed permutation costs nothing: number n of the run falls in epoch n // windows, and a Feistel network keyed by
(seed, epoch) sends its place there to a window. The network works on a grid of rows x columns that barely exceeds the
number of windows, and a place that lands outside is sent round again until it lands inside (cycle walking; Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). So every window comes exactly once in every epoch, and resume
needs one integer.
"""

from __future__ import annotations

import hashlib
import math
import struct

_MASK = 2**64 - 1


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every bit of x moves about half of those of the result."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class Order:
    """The window of each sequence number. O(1) a look-up, about 10 us, for any number of windows below 2**63."""

    def __init__(self, seed: int, windows: int) -> None:
        self.seed, self.windows = seed, windows
        self._rows = math.isqrt(windows - 1) + 1
        self._columns = -(-windows // self._rows)

    def window(self, number: int) -> int:
        """The window that sequence `number` of the run reads, in [0, windows)."""
        epoch, place = divmod(number, self.windows)
        keys = struct.unpack("<8Q", hashlib.blake2b(f"order {self.seed} {epoch}".encode()).digest())
        place = self._permute(place, keys)
        while place >= self.windows:
            place = self._permute(place, keys)
        return place

    def _permute(self, place: int, keys: tuple[int, ...]) -> int:
        """Eight Feistel rounds on the grid; each adds to one half a function of the other, so each can be undone."""
        row, column = divmod(place, self._columns)
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            row = (row + _mix(column ^ even)) % self._rows
            column = (column + _mix(row ^ odd)) % self._columns
        return row * self._columns + column
