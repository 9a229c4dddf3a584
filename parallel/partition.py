"""Assigns blocks of a model to pipeline stages: contiguous, none empty, with the cheapest possible slowest stage.

Exact, by dynamic programming over a few dozen blocks. The usual "layers divided by stages" makes the stage with the
head and the vocabulary the slowest, and every other rank waits for it on every microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class _Split(NamedTuple):
    """The first blocks split into stages. Compared field by field: the last one only breaks ties."""

    worst: float  # cost of the most expensive stage
    squares: float  # sum over stages of cost squared
    starts: tuple[int, ...]

    def add(self, start: int, cost: float) -> _Split:
        return _Split(max(self.worst, cost), self.squares + cost**2, (*self.starts, start))


def partition(costs: Sequence[float], stages: int) -> tuple[range, ...]:
    """Split blocks 0..n-1 into `stages` ranges. `costs` are in any unit, one per block.

    The largest cost of a stage is the least possible. Between equals, each prefix of stages takes the least sum of
    squares: even, if not always the most even split of all. Raises ValueError when there are more stages than blocks.
    """
    if stages > len(costs):
        raise ValueError(
            f"{stages} stages need at least {stages} blocks and the model has {len(costs)}: "
            f"use fewer pipeline ranks or more layers"
        )
    upto = [0.0, *accumulate(costs)]
    # best[end]: the best split of blocks 0..end-1 into the stages so far.
    best = {0: _Split(0.0, 0.0, ())}
    for stage in range(1, stages + 1):
        # Every later stage needs a block too.
        ends = range(stage, len(costs) - (stages - stage) + 1)
        best = {
            end: min(split.add(start, upto[end] - upto[start]) for start, split in best.items() if start < end)
            for end in ends
        }
    starts = best[len(costs)].starts
    return tuple(range(a, b) for a, b in zip(starts, (*starts[1:], len(costs)), strict=True))
