"""Which source each sequence of a blend comes from: a pure function of (weights, number), exact to one sequence.

Over every prefix of the run, each source has had its share of the sequences, rounded up or down: after n sequences a
source of weight w has given floor(n w) or ceil(n w). Such orders exist for any weights (the chairman assignment
problem, Tijdeman 1980) and come from giving every sequence of a source a release and a deadline, and always taking the
released one with the earliest deadline. But that walks through the run from its beginning, and a resume would too.

So the numbers are cut into blocks in which every source has at least one sequence. Where two blocks meet, the counts
are computed directly: each source's share rounded down, and one more for as many sources as the sum needs. Which ones
is chosen so that both neighbours can be filled: of the sources that have no deadline until some time, never more are
ahead than that time allows, and of those that were released before some time, never fewer (`fair_rounding`). Between
two such edges the releases and deadlines fit again (Hall's condition), and earliest deadline first fills the block.

Drawing sources at random, as mixtures often are, misses a share by the square root of n; rounding shares one after the
other, as a tree of sources does, by the logarithm of their number.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dryvine.comm.integers import ceil_div
from dryvine.trainer.data.fair_rounding import round_along

LARGEST_BLOCK = 2**20  # sequences; a source must have one in each block
_LEAST_BLOCK = 1024
_LARGEST_SUM = 2**40  # of weights: times a block's length, it fits an int64
_KEPT_BLOCKS = 4


class BlendPlace(NamedTuple):
    """Sequence `number` of source `source`, both from 0."""

    source: int
    number: int


class _Stretch(NamedTuple):
    sources: NDArray[np.int32]  # of each sequence in the block
    numbers: NDArray[np.int64]  # which of its source's sequences each is


class BlendOrder:
    """The order of a blend whose sources have these weights, whole numbers of any sum (see `whole_weights`).

    A look-up takes a microsecond in the block that was used last, and about a microsecond for each sequence of a new
    block: 1 ms, unless a source has less than a thousandth of the sum.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights, self.whole = tuple(weights), sum(weights)
        self.length = max(_LEAST_BLOCK, ceil_div(self.whole, min(weights)))
        self._blocks: dict[int, _Stretch] = {}

    def place(self, number: int) -> BlendPlace:
        """The source of sequence `number` of the blend, and its number there."""
        index, offset = divmod(number, self.length)
        block = self._block(index)
        return BlendPlace(int(block.sources[offset]), int(block.numbers[offset]))

    def counts(self, length: int) -> list[int]:
        """How many of the first `length` sequences come from each source."""
        index, offset = divmod(length, self.length)
        inside = np.bincount(self._block(index).sources[:offset], minlength=len(self.weights))
        return [before + int(more) for before, more in zip(self._counts_at(index), inside, strict=True)]

    def _block(self, index: int) -> _Stretch:
        if index not in self._blocks:
            while len(self._blocks) >= _KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[index] = self._fill(index)
        return self._blocks[index]

    def _counts_at(self, index: int) -> list[int]:
        """Sequences of each source before a block: its share, rounded."""
        shares = [divmod(index * self.length * weight, self.whole) for weight in self.weights]
        parts = {source: part for source, (_, part) in enumerate(shares) if part}
        # In units of 1 / whole: how long until each of these shares is a whole number, and since when it was.
        until = {s: Fraction(self.whole - part, self.weights[s]) for s, part in parts.items()}
        since = {s: Fraction(part, self.weights[s]) for s, part in parts.items()}
        names = list(parts)
        orders = tuple([names.index(s) for s in sorted(names, key=when.__getitem__)] for when in (until, since))
        ahead = round_along((orders[0], orders[1]), [parts[s] for s in names], self.whole)
        extra = dict(zip(names, ahead, strict=True))
        return [share + extra.get(source, 0) for source, (share, _) in enumerate(shares)]

    def _fill(self, index: int) -> _Stretch:
        """Earliest deadline first, from the counts at the block's start to those at its end."""
        first, last = self._counts_at(index), self._counts_at(index + 1)
        releases, deadlines, sources = self._windows(index, first, last)
        order = np.argsort(releases, kind="stable")
        by_release = list(
            zip(releases[order].tolist(), deadlines[order].tolist(), sources[order].tolist(), strict=True)
        )
        ready: list[tuple[int, int]] = []  # deadline, source
        picks, upcoming = np.empty(self.length, np.int32), 0
        for time in range(self.length):
            while upcoming < self.length and by_release[upcoming][0] <= time:
                heapq.heappush(ready, by_release[upcoming][1:])
                upcoming += 1
            picks[time] = heapq.heappop(ready)[1]
        numbers = np.empty(self.length, np.int64)
        for source, start in enumerate(first):
            mine = np.flatnonzero(picks == source)
            numbers[mine] = np.arange(start, start + mine.size)
        return _Stretch(picks, numbers)

    def _windows(self, index: int, first: Sequence[int], last: Sequence[int]) -> tuple[NDArray[np.int64], ...]:
        """Of every sequence in the block, in places of the block: the first it may take, the one it must come before,
        and its source. Sequence j of weight w may come when w n > j is next, and must while w n <= j + 1."""
        start, found = index * self.length, []
        for source, weight in enumerate(self.weights):
            # j * whole - start * weight for the source's first sequence here: small, whatever the block.
            offset = first[source] * self.whole - start * weight
            ahead = offset + np.arange(last[source] - first[source], dtype=np.int64) * self.whole
            release, deadline = ahead // weight, -((-ahead - self.whole) // weight)
            found.append((release.clip(0), deadline.clip(max=self.length), np.full(ahead.size, source)))
        return tuple(np.concatenate(part) for part in zip(*found, strict=True))


def whole_weights(weights: Sequence[Fraction]) -> list[int]:
    """Integers in the ratio of the weights: exact if their sum is then at most 2**40, else to 40 bits."""
    common = math.lcm(*(weight.denominator for weight in weights))
    exact = [int(weight * common) for weight in weights]
    divisor = math.gcd(*exact)
    if sum(exact) <= _LARGEST_SUM * divisor:
        return [weight // divisor for weight in exact]
    return [max(1, weight * (_LARGEST_SUM // 2) // sum(exact)) for weight in exact]
