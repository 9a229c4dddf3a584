"""The search must price as the simulator does, lose no op, keep the limit, and never be worse than what has a name."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dryvine.parallel.schedule.check import check
from dryvine.parallel.schedule.costs import Costs
from dryvine.parallel.schedule.notation import from_csv, to_csv
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.search.anneal import TimedRows, anneal
from dryvine.parallel.schedule.search.bound import lower_bound
from dryvine.parallel.schedule.search.exact import solve
from dryvine.parallel.schedule.search.fold import Pipe, fold, tidy, unfold
from dryvine.parallel.schedule.search.grow import grow
from dryvine.parallel.schedule.search.moves import propose
from dryvine.parallel.schedule.search.read import read
from dryvine.parallel.schedule.search.search import Effort, Problem, in_one_measure, search
from dryvine.parallel.schedule.simulate import simulate
from dryvine.parallel.schedule.table import build

COSTS = Costs(F=1, I=1.3, W=0.8, comm=1 / 3)  # compute:communication 2:1
LATE = Costs(F=1, I=1.3, W=0.8, comm=1 / 3, P2P=0.15)


def pipe_of(name: str, pp: int, microbatches: int, costs: Costs, memory: int = 99) -> Pipe:
    if name == "dualpipe":
        return Pipe(pp // 2, microbatches // 2, memory, costs, mirrored=True)
    return Pipe(pp, microbatches, memory, costs, mirrored=False)


@pytest.mark.parametrize(
    ("name", "pp", "m"), [("dualpipe", 4, 10), ("dualpipe", 2, 4), ("dualpipev", 3, 7), ("zbv", 4, 5)]
)
@pytest.mark.parametrize("costs", [COSTS, LATE])
def test_folding_is_exact_and_prices_as_the_simulator(name, pp, m, costs):
    schedule = build(name, pp, m)
    pipe, rows = pipe_of(name, pp, m, costs), fold(schedule)
    assert unfold(pipe, rows, name) == schedule
    assert TimedRows(pipe, rows).span == pytest.approx(simulate(schedule, costs).span)


@given(st.integers(0, 10_000), st.sampled_from(["dualpipe", "zbv"]))
@settings(max_examples=20, deadline=None)
def test_a_walk_keeps_every_op_and_its_times(seed, name):
    """After hundreds of changes priced in part, the times are those of a simulation of the whole schedule."""
    rng = random.Random(seed)
    pipe = pipe_of(name, 4, 8, LATE, memory=5 if name == "dualpipe" else 9)
    state = TimedRows(pipe, fold(build(name, 4, 8)))
    for _ in range(400):
        changes = propose(state.rows, rng)
        trial = state.attempt(changes, state.score + 1.0) if changes else None
        if trial:
            state.accept(trial)
    schedule = unfold(pipe, state.rows, "walk")
    check(schedule)
    timeline = simulate(schedule, LATE)
    assert timeline.span == pytest.approx(state.span)
    assert timeline.peak_activations <= pipe.memory
    starts = [[cell.start for cell in row] for row in timeline.cells[: pipe.ranks]]
    assert all(a == pytest.approx(b) for a, b in zip(starts, state.starts, strict=True))
    assert from_csv(to_csv(schedule), "walk") == schedule  # pairs of any kinds


@given(st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_proposals_conserve_ops(seed):
    rows = fold(build("dualpipe", 6, 12))
    changes = propose(rows, random.Random(seed)) or {}

    def ops(row):
        count = Counter(letter for slot in row for letter in slot)
        for leg in (0, 1):  # B is I and W
            whole = count.pop(("B", leg), 0)
            count["I", leg] += whole
            count["W", leg] += whole
        return count

    assert all(ops(row) == ops(rows[rank]) for rank, row in changes.items())


def test_a_trial_refuses_too_much_memory_and_too_late():
    pipe = pipe_of("dualpipe", 4, 8, COSTS, memory=5)
    rows = fold(build("dualpipe", 4, 8))
    state = TimedRows(pipe, rows)
    assert read(pipe, 0, [(("F", 0),), (("F", 1),)] * 3) is None  # a sixth chunk
    assert read(pipe, 0, [(("F", 0),), (("F", 1),)] * 2) is not None
    assert read(pipe, 0, [(("I", 0),)]) is None  # before its forward
    assert read(pipe, 0, [(("F", 0),), (("W", 0),)]) is None  # before its I
    swapped = [rows[0][1], rows[0][0], *rows[0][2:]]
    assert state.attempt({0: swapped}, state.score) is None  # alike: nothing changed
    merged = [rows[0][0] + rows[0][1], *rows[0][2:]]
    assert state.attempt({0: merged}, state.span - 1) is None
    assert state.attempt({0: merged}, state.span + 1) is not None


def test_beats_dualpipe_at_its_own_memory():
    problem, effort = Problem(4, 8, COSTS), Effort(steps=20_000)
    found = search(problem, effort)
    check(found.timeline.schedule)
    assert found.named.schedule.name == "dualpipe"
    assert found.timeline.peak_activations <= 5
    assert found.bound <= found.timeline.span
    assert found.gain == pytest.approx(1 - found.timeline.span / found.named.span)
    assert 0.08 < found.gain < 0.2
    kinds = {"".join(op.kind for op in slot) for row in found.timeline.schedule.ranks for slot in row if len(slot) > 1}
    assert not kinds <= {"FB", "BF"}
    assert "WW" not in kinds  # saves nothing
    assert found == search(problem, effort)


@pytest.mark.parametrize(
    ("pp", "m", "memory", "copies", "costs"),
    [(4, 8, 5, 2, Costs()), (4, 8, 3, 2, COSTS), (3, 7, None, 2, LATE), (4, 6, 4, 1, COSTS), (1, 1, 2, 1, Costs())],
)
def test_never_worse_than_the_best_named_one(pp, m, memory, copies, costs):
    found = search(Problem(pp, m, costs, memory, copies), Effort(steps=2_000, rounds=1))
    check(found.timeline.schedule)
    stages = found.timeline.schedule.stages
    assert found.timeline.peak_activations * pp / stages <= (pp + 1 if memory is None else memory)
    assert len(found.timeline.schedule.routes) <= copies
    assert in_one_measure(found.timeline.schedule, costs).span == pytest.approx(found.timeline.span)
    if found.named:
        assert found.timeline.span <= found.named.span


def test_a_long_pipe_grows_from_a_short_one_without_new_bubbles():
    short, long = pipe_of("dualpipe", 4, 8, COSTS, 5), pipe_of("dualpipe", 4, 20, COSTS, 5)
    rows = anneal(short, fold(build("dualpipe", 4, 8)), 5_000, seed=1)
    longer = grow(short, rows, long)
    steady = 12 * (2 * COSTS.F / 3 + 2 * COSTS.I / 3 + COSTS.W)
    check(unfold(long, longer, "long"))
    assert TimedRows(long, longer).span <= TimedRows(short, rows).span + steady + 0.5
    assert search(Problem(4, 20, COSTS), Effort(steps=4_000, rounds=1)).gain > 0.02


def test_the_folded_pipe_of_a_problem():
    half = LATE.of_a_part(0.5)
    assert Problem(4, 8, LATE).pipe == Pipe(2, 4, 5, LATE, mirrored=True)
    assert Problem(4, 8, LATE, memory=3, copies=1).pipe == Pipe(4, 8, 6, half, mirrored=False)
    assert Problem(3, 8, LATE).pipe == Pipe(3, 8, 8, half, mirrored=False)
    assert Problem(4, 7, LATE).pipe == Pipe(4, 7, 10, half, mirrored=False)


@pytest.mark.parametrize(("memory", "copies", "name"), [(5, 2, "dualpipe"), (4, 1, "zbv"), (3, 1, None)])
def test_the_best_named_schedule_within_the_limit(memory, copies, name):
    """In chunks of a P-th of the model: ZB-V holds 2P of half the size."""
    found = search(Problem(4, 8, Costs(I=1, W=1, pairs={"BF": 2.2}), memory, copies), Effort(steps=10, rounds=1))
    assert (found.named.schedule.name if found.named else None) == name


def test_the_bound_by_hand():
    costs = Costs(P2P=0.5)  # F = I = W = 1
    # Until 2 F and a hop at 2.5, the rank can run 2 of its 12.
    assert lower_bound(Pipe(1, 2, 2, costs, mirrored=True)) == 2.5 + 12 - 2
    # The turn of a V is no message.
    assert lower_bound(Pipe(1, 2, 2, costs, mirrored=False)) == 2 + 12 - 2
    # Rank 1: back at 4 F, 2 hops, and an I with its hop; it can run 3 F until then.
    assert lower_bound(Pipe(2, 2, 3, costs, mirrored=False)) == 6.5 + 12 - 3
    # More memory than time: from its first F at 1.5 to its first I at 6.5, and only 4 F are there.
    assert lower_bound(Pipe(2, 2, 99, costs, mirrored=False)) == 6.5 + 12 - 4
    # One microbatch: there and back, and the last W.
    assert lower_bound(Pipe(2, 1, 2, Costs(), mirrored=False)) == 4 + 4 + 1


def test_tidy_parts_the_pairs_that_save_nothing():
    pipe = pipe_of("dualpipe", 4, 8, COSTS)
    row = [(("W", 0), ("W", 1)), (("F", 0), ("B", 1)), (("W", 1),)]
    assert tidy(pipe, row) == [(("W", 0),), (("W", 1),), (("F", 0), ("B", 1)), (("W", 1),)]


def test_an_impossible_limit_is_refused():
    with pytest.raises(ScheduleError, match="as few as 1 chunks"):
        search(Problem(4, 8, COSTS, memory=1), Effort())


@given(st.integers(1, 4), st.integers(1, 8), st.floats(0, 0.6), st.floats(0.3, 2), st.floats(0, 0.5))
@settings(max_examples=15, deadline=None)
def test_no_schedule_undercuts_the_bound(ranks, more, comm, i, p2p):
    costs = Costs(F=1, I=i, W=0.7, comm=comm, P2P=p2p, layers=2)
    for name, pp, m in (("dualpipe", 2 * ranks, 4 * ranks + 2 * more), ("zbv", ranks, 2 * ranks + more)):
        schedule = build(name, pp, m)
        held = simulate(schedule, costs).peak_activations
        pipe, rows = pipe_of(name, pp, m, costs, held), fold(schedule)
        better = anneal(pipe, rows, 300, seed=more)
        assert lower_bound(pipe) <= TimedRows(pipe, better).span + 1e-9


def test_exact_search_proves_what_annealing_finds():
    pytest.importorskip("ortools")
    pipe = Pipe(1, 2, 3, COSTS, mirrored=True)
    annealed = TimedRows(pipe, anneal(pipe, fold(build("dualpipe", 2, 4)), 20_000, seed=0))
    best = solve(pipe, horizon=20.0, seconds=30.0)
    assert best.proven
    assert lower_bound(pipe) <= best.bound + 1e-9
    assert best.span == pytest.approx(annealed.span, abs=0.02)
    optimum = unfold(pipe, best.rows, "exact")
    check(optimum)
    assert simulate(optimum, COSTS).span == pytest.approx(best.span, abs=0.02)
    assert simulate(optimum, COSTS).span < simulate(build("dualpipe", 2, 4), COSTS).span


@pytest.mark.parametrize(("mirrored", "span"), [(False, 6), (True, 6.5)])
def test_exact_search_waits_for_messages_and_for_nothing_else(mirrored, span):
    """F, F, I, W, I, W. The turn of a V is on one rank; that of two mirrored ranks is a message, both times, and the
    second wait has a W to fill it."""
    pytest.importorskip("ortools")
    best = solve(Pipe(1, 1, 2, Costs(P2P=0.5), mirrored), horizon=20.0, seconds=30.0)
    assert best.proven
    assert best.span == pytest.approx(span, abs=0.02)


def test_exact_search_keeps_to_the_memory():
    """Two ranks, two microbatches: with one chunk fewer the second has to wait."""
    pytest.importorskip("ortools")
    spans = []
    for memory in (4, 2):
        pipe = Pipe(2, 2, memory, Costs(), mirrored=False)
        best = solve(pipe, horizon=40.0, seconds=30.0)
        assert best.proven
        timeline = simulate(unfold(pipe, best.rows, "exact"))
        assert timeline.peak_activations <= memory
        assert timeline.span == pytest.approx(best.span, abs=0.02)
        spans.append(best.span)
    assert spans[0] < spans[1]
