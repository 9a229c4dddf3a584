"""Blocks to stages: contiguous, complete, and as even as brute force finds."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dryvine.parallel.partition import partition


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_the_dearest_stage_is_as_cheap_as_brute_force_finds(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    parts = partition(costs, stages)
    assert [i for part in parts for i in part] == list(range(len(costs)))
    assert all(len(part) for part in parts)
    best = min(
        max(sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True))
        for cuts in combinations(range(1, len(costs)), stages - 1)
    )
    assert max(sum(costs[i] for i in part) for part in parts) == best


def test_more_stages_than_blocks_is_refused_with_a_fix() -> None:
    with pytest.raises(ValueError, match="fewer pipeline ranks or more layers"):
        partition([1.0, 1.0], 3)


@pytest.mark.parametrize(
    ("costs", "ranges"),
    [
        ([2, 1, 5, 3, 5], ((0, 2), (2, 3), (3, 5))),  # 3 5 8, not 2 6 8
        ([1, 4, 2, 3], ((0, 2), (2, 3), (3, 4))),  # 5 2 3, not 1 4 5
        ([6, 3, 1, 1, 4], ((0, 1), (1, 3), (3, 5))),  # 6 4 5, not 6 3 6
    ],
)
def test_of_splits_with_the_same_largest_cost_an_even_one(
    costs: list[int], ranges: tuple[tuple[int, int], ...]
) -> None:
    assert partition(costs, 3) == tuple(range(*pair) for pair in ranges)
