"""A long pipe from a short one: the steady state in the middle repeats, so only its ends need a search.

Cut every rank at one time and put in, as often as needed, F&I of the two legs with their W between: pairs that hide
every message. What a rank did before it still does, some microbatches further on, so nothing new is waited for.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from dryvine.parallel.schedule.search.anneal import TimedRows
from dryvine.parallel.schedule.search.fold import Pipe, Row

STEADY: tuple[Row, ...] = (
    [(("F", 0), ("I", 1)), (("W", 1),), (("F", 1), ("I", 0)), (("W", 0),)],
    [(("F", 1), ("I", 0)), (("W", 0),), (("F", 0), ("I", 1)), (("W", 1),)],
)
SWEEPS = 2


class _Filled(NamedTuple):
    """Rows with steady blocks put in; None, with an infinite score, if they cannot be run."""

    score: float
    rows: list[Row] | None
    cuts: list[tuple[int, Row]]  # per rank, the slot before which it was cut, and the block that was put in


def grow(short: Pipe, rows: list[Row], long: Pipe) -> list[Row] | None:
    """The rows of the short pipe, made as long as `long`. None if no cut can be run."""
    times = long.share - short.share
    best = min((_fill(long, rows, cuts, times) for cuts in _common_cuts(short, rows, long)), key=_score)
    # Then each rank's own best cut and block, the others' kept.
    for _ in range(SWEEPS):
        for rank, row in enumerate(rows):
            others = ([*best.cuts[:rank], (at, b), *best.cuts[rank + 1 :]] for at in range(len(row)) for b in STEADY)
            best = min((best, *(_fill(long, rows, cuts, times) for cuts in others)), key=_score)
    return best.rows


def _common_cuts(short: Pipe, rows: list[Row], long: Pipe) -> Iterator[list[tuple[int, Row]]]:
    """Every rank cut at one time, or at times that slant from rank to rank, and every phase of the steady blocks."""
    starts = TimedRows(short, rows).starts
    beat = sum(long.prices[slot] for slot in STEADY[0]) / 2
    for time in starts[0]:
        for slant in (-beat, -beat / 2, 0.0, beat / 2, beat):
            cuts = [bisect_left(own, time + slant * rank) for rank, own in enumerate(starts)]
            for first in (0, 1):
                for step in (0, 1):
                    blocks = [STEADY[(first + step * rank) % 2] for rank in range(long.ranks)]
                    yield list(zip(cuts, blocks, strict=True))


def _fill(pipe: Pipe, rows: list[Row], cuts: list[tuple[int, Row]], times: int) -> _Filled:
    longer = [[*row[:at], *block * times, *row[at:]] for row, (at, block) in zip(rows, cuts, strict=True)]
    try:
        return _Filled(TimedRows(pipe, longer).score, longer, cuts)
    except ValueError:
        return _Filled(math.inf, None, cuts)


def _score(filled: _Filled) -> float:
    return filled.score
