"""A long pipe from a short one: the steady state in the middle repeats, so only its ends need a search.

Cut every rank at one time and put in, as often as needed, F&I of the two legs with their W between: pairs that hide
every message. What each rank did before it still did, one microbatch further on, so nothing new is waited for.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from dryvine.parallel.schedule.search.anneal import TimedRows
from dryvine.parallel.schedule.search.fold import Pipe, Row

STEADY: tuple[Row, ...] = (
    [(("F", 0), ("I", 1)), (("W", 1),), (("F", 1), ("I", 0)), (("W", 0),)],
    [(("F", 1), ("I", 0)), (("W", 0),), (("F", 0), ("I", 1)), (("W", 1),)],
)
SWEEPS = 2


def grow(short: Pipe, rows: list[Row], long: Pipe) -> list[Row] | None:
    """The rows of the short pipe, made as long as `long`: the best time to cut, the same for all or slanting from rank
    to rank, then each rank's own best place. None if no cut can be run."""
    state = TimedRows(short, rows)
    extra = long.share - short.share
    beat = sum(long.prices[slot] for slot in STEADY[0]) / 2
    slants = [beat * part for part in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    cuts = [
        [bisect_left(starts, time + slant * rank) for rank, starts in enumerate(state.starts)]
        for time in state.starts[0]
        for slant in slants
    ]
    phases = [[STEADY[(first + step * rank) % 2] for rank in range(long.ranks)] for first in (0, 1) for step in (0, 1)]
    best = min((_fill(long, rows, list(zip(c, b, strict=True)), extra) for c in cuts for b in phases), key=_score)
    for _ in range(SWEEPS):
        for rank, row in enumerate(rows):
            others = ([*best[2][:rank], (cut, b), *best[2][rank + 1 :]] for cut in range(len(row)) for b in STEADY)
            best = min((best, *(_fill(long, rows, places, extra) for places in others)), key=_score)
    return best[1]


Filled = tuple[
    float, list[Row] | None, list[tuple[int, Row]]
]  # score, rows, and where each rank was cut for which block


def _score(filled: Filled) -> float:
    return filled[0]


def _fill(pipe: Pipe, rows: list[Row], places: list[tuple[int, Row]], times: int) -> Filled:
    longer = [[*row[:cut], *block * times, *row[cut:]] for row, (cut, block) in zip(rows, places, strict=True)]
    try:
        return TimedRows(pipe, longer).score, longer, places
    except ValueError:
        return math.inf, None, places
