"""Blocks of a model to pipeline stages: contiguous, none empty, the dearest stage as cheap as can be.

Exact, by dynamic programming over a few dozen blocks; the usual "layers divided by stages" leaves the stage with the
head and the vocabulary as the slowest, and every other rank waits for it on every microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def partition(costs: Sequence[float], stages: int) -> tuple[range, ...]:
    """Split blocks 0..n-1 into `stages` ranges. `costs` are in any unit, one per block.

    Of all splits with the least largest cost it takes one whose costs vary least, judged by their squares.
    Raises ValueError when there are more stages than blocks.
    """
    if stages > len(costs):
        raise ValueError(
            f"{stages} stages need at least {stages} blocks and the model has {len(costs)}: "
            f"use fewer pipeline ranks or more layers"
        )
    upto = [0.0, *accumulate(costs)]
    best: list[dict[int, tuple[tuple[float, float], tuple[int, ...]]]] = [{0: ((0.0, 0.0), ())}]
    for stage in range(1, stages + 1):
        row = {}
        for end in range(stage, len(costs) - (stages - stage) + 1):
            row[end] = min(
                (
                    (max(worst, upto[end] - upto[start]), squares + (upto[end] - upto[start]) ** 2),
                    (*cuts, start),
                )
                for start, ((worst, squares), cuts) in best[-1].items()
                if start < end
            )
        best.append(row)
    starts = best[stages][len(costs)][1]
    return tuple(range(a, b) for a, b in zip(starts, (*starts[1:], len(costs)), strict=True))
