"""Learning rate and batch ramp are pure functions of the step."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dryvine.trainer.ramps import (
    BatchConfig,
    Change,
    OptimConfig,
    Point,
    Segment,
    changed,
    gradient_scale,
    learning_rate,
    points,
)


def at(step: int) -> Point:
    return Point(step, step * 8, 8, 10)


V3 = OptimConfig(
    lr=2.2e-4,
    plan=(
        Segment(shape="linear", length=2000, to=1.0),
        Segment(shape="constant", length=8000, to=1.0),
        Segment(shape="cosine", length=4000, to=0.1),
        Segment(shape="constant", length=500, to=0.0332),
    ),
)


def test_the_plan_is_followed_segment_by_segment() -> None:
    rates = {step: learning_rate(V3, at(step)) for step in (0, 999, 1999, 9999, 11999, 13999, 14000, 99999)}
    wanted = {0: 1 / 2000, 999: 0.5, 1999: 1, 9999: 1, 11999: 0.55, 13999: 0.1, 14000: 0.0332, 99999: 0.0332}
    assert rates == pytest.approx({step: share * 2.2e-4 for step, share in wanted.items()})


def test_a_plan_in_tokens_is_the_same_plan() -> None:
    plan = tuple(s.model_copy(update={"length": s.length * 80}) for s in V3.plan)
    tokens = V3.model_copy(update={"plan": plan, "plan_unit": "tokens"})
    for step in (0, 5, 1999, 2000, 12345, 14100):
        assert learning_rate(tokens, at(step)) == pytest.approx(learning_rate(V3, at(step)))


@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 4), st.integers(1, 5000))
def test_the_ramp_grows_in_equal_parts_and_misses_no_sequence(first: int, parts: int, by: int, tokens: int) -> None:
    batch = BatchConfig(sequences=first + parts * by, ramp_from=first, ramp_increment=by, ramp_tokens=tokens)
    steps = list(islice(points(batch, 10), 300))
    for before, after in pairwise(steps):
        assert after.first == before.first + before.sequences
        assert after.sequences - before.sequences in range(0, parts * by + 1, by)
    assert steps[0].sequences == first
    assert all(p.sequences == first + parts * by for p in steps if p.tokens_before >= tokens)
    assert {p.sequences for p in steps} <= set(batch.sizes())


def test_a_ramp_stays_equally_long_at_every_size() -> None:
    batch = BatchConfig(sequences=16, ramp_from=8, ramp_increment=4, ramp_tokens=300)
    assert [batch.at(tokens) for tokens in (0, 99, 100, 199, 200, 299, 300, 9999)] == [8, 8, 12, 12, 16, 16, 16, 16]


def test_a_point_counts_its_tokens_and_those_before() -> None:
    batch = BatchConfig(sequences=16, ramp_from=8, ramp_increment=8, ramp_tokens=300)
    steps = list(islice(points(batch, 10), 4))
    assert [(p.step, p.first, p.sequences) for p in steps] == [(0, 0, 8), (1, 8, 8), (2, 16, 16), (3, 32, 16)]
    assert [(p.tokens_before, p.tokens) for p in steps] == [(0, 80), (80, 80), (160, 160), (320, 160)]


def test_a_ramp_that_cannot_end_at_its_goal_is_refused() -> None:
    with pytest.raises(ValidationError, match="whole number of ramp_increment"):
        BatchConfig(sequences=10, ramp_from=3, ramp_increment=4, ramp_tokens=100)


@pytest.mark.parametrize(("sequences", "seq_len", "scale"), [(1, 1, 1.0), (16, 256, 4096.0), (15360, 4096, 2.0**25)])
def test_gradients_are_scaled_by_the_power_of_two_at_or_below_the_tokens(
    sequences: int, seq_len: int, scale: float
) -> None:
    assert gradient_scale(Point(0, 0, sequences, seq_len)) == scale


def test_a_change_by_tokens_holds_from_the_step_that_begins_after_them() -> None:
    """V3: lambda 0.3 for the first 10T tokens, then 0.1. Here 1000 and 3000, in any order."""
    plan = (Change(after=3000, to=0.0), Change(after=1000, to=0.1))
    values = [changed(0.3, plan, Point(0, first, 1, 1)) for first in (0, 999, 1000, 2999, 3000, 9000)]
    assert values == [0.3, 0.3, 0.1, 0.1, 0.0, 0.0]
    assert changed(0.3, (), Point(0, 9000, 1, 1)) == 0.3


def test_two_changes_after_the_same_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="mtp_weight_plan has two changes after the same tokens"):
        OptimConfig(mtp_weight_plan=(Change(after=5, to=0.1), Change(after=5, to=0.2)))
