"""Every generator over its legal sizes: complete, no deadlock, FIFO, with the bubbles and peaks of the papers."""

from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dryvine.parallel.schedule.check import check
from dryvine.parallel.schedule.costs import Costs
from dryvine.parallel.schedule.ir import Op
from dryvine.parallel.schedule.lower import forward_only, lower
from dryvine.parallel.schedule.notation import from_csv, to_csv
from dryvine.parallel.schedule.rules import FAR, ScheduleError, Sizes
from dryvine.parallel.schedule.simulate import simulate
from dryvine.parallel.schedule.table import SCHEDULES, build, legal

NAMES = st.sampled_from(sorted(SCHEDULES))
SIZES = st.builds(Sizes, st.integers(1, 9), st.integers(1, 26), st.integers(1, 4))
unit = Costs()  # F = I = W = 1, F&B = 3


@given(NAMES, SIZES)
@settings(max_examples=400, deadline=None)
def test_every_legal_size_checks_and_survives_text(name, sizes):
    assume(legal(name, *sizes) is None)
    schedule = build(name, *sizes)
    check(schedule)
    check(forward_only(schedule))
    assert from_csv(to_csv(schedule), schedule.name) == schedule
    timeline = simulate(schedule, unit)
    assert timeline.span >= timeline.bubble >= 0
    assert 0 <= timeline.overlapped_share <= 1


@given(NAMES, SIZES)
@settings(max_examples=300, deadline=None)
def test_illegal_sizes_are_refused_with_a_legal_neighbour(name, sizes):
    assume(legal(name, *sizes) is not None)
    with pytest.raises(ScheduleError, match="nearest legal: ") as refusal:
        build(name, *sizes)
    for hint in str(refusal.value).split("nearest legal: ")[1].split(" or "):
        changed = dict(part.split("=") for part in hint.split(", "))
        near = sizes._replace(**{key: int(value) for key, value in changed.items()})
        assert legal(name, *near) is None, (name, sizes, hint)


def test_refusals_name_the_nearest_sizes():
    assert legal("dualpipe", 3, 8) == (
        "dualpipe cannot run pp=3, microbatches=8, chunks=1: "
        "it needs pp even, microbatches even and at least twice pp, chunks 1; nearest legal: pp=2 or pp=4"
    )
    assert str(legal("dualpipe", 5, 7, 2)).endswith("nearest legal: pp=4, microbatches=8, chunks=1")
    assert str(legal("dualpipev", 4, 6)).endswith("nearest legal: pp=3 or microbatches=8")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sizes", [(10**9, 3, 1), (3, 10**9 + 1, 3), (1, 4, 10**9), (3001, 5, 1), (10**9,) * 3])
def test_absurd_sizes_are_refused_soon(name, sizes):
    """Nearest sizes are searched for within reach only: to walk to a billion would take minutes."""
    generator, asked = SCHEDULES[name], []

    def allows(near):
        asked.append(near)
        return generator.allows(near)

    generator._replace(allows=allows).explain(name, Sizes(*sizes))
    assert len(asked) < 10 * FAR


@given(st.integers(1, 8).map(lambda h: 2 * h), st.integers(0, 20).map(lambda n: 2 * n))
@settings(max_examples=50, deadline=None)
def test_dualpipe_is_as_the_paper_says(pp, more):
    timeline = simulate(build("dualpipe", pp, 2 * pp + more), unit)
    assert timeline.bubble == (pp / 2 - 1) * (3 + 2 - 3)
    assert {timeline.held(rank) for rank in range(pp)} == {pp + 1}
    assert timeline.params_per_rank == 2


@given(st.integers(1, 10), st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_dualpipev_is_dualpipe_on_twice_the_stages(pp, more):
    timeline = simulate(build("dualpipev", pp, 2 * pp + more), unit)
    assert timeline.bubble == (2 * pp / 2 - 1) * (3 + 2 - 3)
    assert {timeline.held(rank) for rank in range(pp)} == {2 * pp + 1}


@given(st.integers(1, 10), st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_the_other_bubbles_and_peaks(pp, more):
    m = pp + more

    def figures(name, microbatches=m, chunks=1):
        timeline = simulate(build(name, pp, microbatches, chunks), unit)
        return timeline.bubble, timeline.peak_activations

    assert figures("gpipe") == ((pp - 1) * 3, m)
    assert figures("one_f_one_b") == ((pp - 1) * 3, pp)
    assert figures("zb1p") == ((pp - 1) * (1 + 2 - 2), pp)
    bubble, _ = figures("interleaved", 2 * pp, 3)
    assert bubble == (pp - 1) * 3  # in units of a third of 1F1B's stage
    assert figures("zbv", 2 * m) == (pp - 1, 2 * pp)


def test_bubbles_hold_as_upper_bounds_at_other_costs():
    costs = Costs(F=1, I=1.3, W=0.8, pairs={"BF": 2.4})
    for pp in (4, 8, 16):
        timeline = simulate(build("dualpipe", pp, 2 * pp + 8), costs)
        assert timeline.bubble <= (pp / 2 - 1) * (2.4 + 2.1 - 3 * 0.8) + 1e-9


@given(st.integers(1, 5), st.integers(1, 20), st.sampled_from(sorted(SCHEDULES)))
@settings(max_examples=150, deadline=None)
def test_lowering_sends_what_is_received(pp, microbatches, name):
    assume(legal(name, pp, microbatches) is None)
    schedule = build(name, pp, microbatches)
    steps = [(rank, step) for rank, row in enumerate(lower(schedule).ranks) for step in row]
    sends = [edge for rank, step in steps for edge in step.sends if edge.source == rank]
    receives = [edge for rank, step in steps for edge in step.receives if edge.target == rank]
    assert sorted(sends) == sorted(receives)
    assert len(set(sends)) == len(sends) == sum(len(step.sends) for _, step in steps)
    hops = sum(a != b for route in schedule.routes for a, b in pairwise(route))
    assert len(sends) == 2 * hops * microbatches / len(schedule.routes)


def test_a_step_waits_for_its_own_messages_and_sends_its_own():
    schedule = build("dualpipe", 4, 8)
    for rank, row in enumerate(lower(schedule).ranks):
        for step in row:
            made = {(op.route, op.microbatch) for op in step.slot if op.kind != "W"}
            assert {(e.route, e.microbatch) for e in step.sends + step.receives} <= made
            assert all(schedule.routes[e.route][e.stage] == rank for e in step.receives)


def test_pairs_are_the_papers_and_the_turn_has_none_to_start():
    schedule = build("dualpipe", 8, 20)
    assert sum(len(slot) == 2 for slot in schedule.ranks[3]) == 2 * (10 - 8 + 3 + 1) - 1
    first_pair = next(slot for slot in schedule.ranks[0] if len(slot) == 2)
    assert first_pair == (Op("F", 0, 7, 0), Op("B", 7, 13, 1))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_small_size_checks(name):
    """All of them: P to 6, M to 13, up to 4 chunks."""
    sizes = [Sizes(pp, m, chunks) for pp in range(1, 7) for m in range(1, 14) for chunks in range(1, 5)]
    for each in sizes:
        if legal(name, *each) is None:
            check(build(name, *each))
