"""Times and prices against runs worked out by hand and by brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dryvine.parallel.schedule.costs import PAIRS, Costs
from dryvine.parallel.schedule.footprint import Footprint
from dryvine.parallel.schedule.ir import Op
from dryvine.parallel.schedule.makespan import Work, makespan
from dryvine.parallel.schedule.notation import from_csv
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.simulate import measured, simulate
from dryvine.parallel.schedule.table import build


def test_times_by_hand():
    timeline = simulate(from_csv("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"), Costs(F=1, I=2, W=1, P2P=0.5))
    assert [(c.start, c.end) for c in timeline.cells[1]] == [(1.5, 2.5), (2.5, 5.5), (5.5, 6.5), (6.5, 9.5)]
    assert [(c.start, c.end) for c in timeline.cells[0]] == [(0, 1), (1, 2), (6, 9), (10, 13)]
    assert (timeline.span, timeline.bubble, timeline.peak_activations) == (13, 5, 2)


def test_the_bubble_is_the_worst_ranks():
    rows = "0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1\n"
    timeline = simulate(from_csv(rows), Costs(pairs={"BF": 2}))
    assert [(c.start, c.end) for c in timeline.cells[1]] == [(1, 2), (2, 4), (4, 6)]
    assert (timeline.span, timeline.idle(0), timeline.idle(1)) == (8, 2, 3)
    assert (timeline.bubble, timeline.bubble_fraction) == (3, 3 / 8)


def test_half_a_stage_costs_half_and_its_messages_the_same():
    costs = Costs(F=2, I=3, W=4, B=6, P2P=0.5, comm=0.25, pairs={"BF": 5}).of_a_part(0.5)
    assert costs == Costs(F=1, I=1.5, W=2, B=3, P2P=0.5, comm=0.25, pairs={"BF": 2.5})


def test_stages_on_one_rank_wait_for_no_message():
    schedule = build("zbv", 1, 1)
    assert simulate(schedule, Costs(P2P=100)).span == 6


def test_the_fullest_rank_counts():
    timeline = simulate(from_csv("0F0,0B0\n1F0,2F0,2B0,1B0\n"))
    assert (timeline.params_per_rank, timeline.peak_activations) == (2, 2)


def test_memory_counts_both_of_a_pair_and_keeps_inputs_until_w():
    rows = "0F0,(0F1;0B0)OVERLAP_F_B,0I1,0F2,0W1,0B2\n"
    assert simulate(from_csv(rows)).peak_activations == 2
    assert simulate(from_csv(rows.replace("(0F1;0B0)OVERLAP_F_B", "0B0,0F1"))).peak_activations == 2
    assert simulate(from_csv("0F0,0B0,0F1,0I1,0W1,0F2,0B2\n")).peak_activations == 1


def test_what_is_held_has_the_size_of_its_stage():
    """Rank 1 holds microbatch 0 of stage 1 until W, and that of stage 2 until B."""
    schedule = from_csv("0F0,0F1,0B0,0B1\n1F0,2F0,2B0,1I0,1F1,1W0,2F1,2B1,1B1\n")
    sizes = {0: 100, 1: 10, 2: 1}
    assert Footprint(schedule).most_held(0, sizes) == 200
    assert Footprint(schedule).most_held(1, sizes) == 20
    assert Footprint(schedule).most_held(1, {0: 100, 1: 1, 2: 10}) == 11
    # Between I and W there is what I has left; a second F is there at the same time.
    assert Footprint(schedule).most_held(1, sizes, {0: 0, 1: 5, 2: 0}) == 25


def test_ratio_of_overlapped_forwards():
    assert simulate(from_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1,0F2,0B2\n")).overlapped_share == pytest.approx(1 / 3)
    shares = [simulate(build("dualpipe", 16, m)).overlapped_share for m in (32, 120)]
    assert 0.28 <= shares[0] <= 0.47
    assert 0.81 <= shares[1] <= 0.86


chains = st.lists(st.builds(Work, st.sampled_from(["compute", "comm"]), st.integers(1, 5).map(float)), max_size=5)


def brute_makespan(a, b):
    """Every order in which the works can be started; each starts when its chain and its resource are free."""
    best = float("inf")
    for places in itertools.combinations(range(len(a) + len(b)), len(a)):
        ended, free, at = [0.0, 0.0], {"compute": 0.0, "comm": 0.0}, [iter(a), iter(b)]
        for i in range(len(a) + len(b)):
            chain = 0 if i in places else 1
            work = next(at[chain])
            ended[chain] = free[work.resource] = max(ended[chain], free[work.resource]) + work.time
        best = min(best, max(ended))
    return best


@given(chains, chains)
@settings(max_examples=200, deadline=None)
def test_the_price_of_a_pair_is_the_shortest_run(a, b):
    assert makespan(tuple(a), tuple(b)) == brute_makespan(a, b)


def test_pair_prices_by_hand():
    """Two F of one layer, a half of each compute: the second starts when the first has freed the compute."""
    assert Costs(comm=0.5, layers=1).pair("F", "F") == 1.25  # c0 c1 c0 c1 of 1/4 each, then the last combine
    assert Costs(comm=0.5, layers=1).pair("F", "W") == 1.5
    costs = Costs(F=1, I=1.3, W=0.8, comm=1 / 3)
    prices = {"FB": 2.333, "FI": 1.533, "FW": 1.467, "IW": 1.667, "FF": 1.375, "II": 1.788, "BI": 2.588, "BB": 3.388}
    assert {pair: round(costs.pair(*pair), 3) for pair in prices} == prices  # as in docs/schedules.md


def test_pair_prices():
    assert all(Costs().pair(*pair) == Costs().op(pair[0]) + Costs().op(pair[1]) for pair in PAIRS)
    costs = Costs(F=1, I=1.3, W=0.8, comm=1 / 3)
    compute = {"F": 2 / 3, "I": 1.3 * 2 / 3, "W": 0.8, "B": 1.3 * 2 / 3 + 0.8}
    for a, b in PAIRS:
        assert compute[a] + compute[b] - 1e-9 <= costs.pair(a, b) <= costs.op(a) + costs.op(b) + 1e-9
        assert costs.pair(a, b) == costs.pair(b, a)
    assert costs.pair("F", "B") == pytest.approx(compute["F"] + compute["B"])  # all messages hide
    assert costs.pair("F", "F") > 2 * compute["F"]  # the last combine has nothing to hide under
    assert sum(p.time for p in costs.chain("B")) == pytest.approx(costs.op("B"))


def test_costs_from_text():
    assert Costs.parse("F=1,I=1,W=1,FB=2.4,P2P=0.1") == Costs(P2P=0.1, pairs={"BF": 2.4})
    assert Costs.parse("fb=2.4").slot((Op("B", 0, 0), Op("F", 0, 1))) == 2.4
    assert Costs.parse("") == Costs()
    for wrong in ("X=1", "F", "F=a", "F=-1", "COMM=1", "LAYERS=0", "F=inf", "LAYERS=nan"):
        with pytest.raises(ScheduleError, match="cost"):
            Costs.parse(wrong)


def test_a_cyclic_wait_is_not_waited_for():
    with pytest.raises(ValueError, match="cyclic wait"):
        simulate(from_csv("0B0,0F0\n"))


def test_a_measured_run_is_drawn_as_a_simulated_one():
    schedule = build("dualpipe", 4, 8)
    times = [[(cell.start + 1e6, cell.end + 1e6) for cell in row] for row in simulate(schedule).cells]
    run = measured(schedule, times)
    assert (run.span, run.bubble, run.cells[0][0].start, run.label) == (26, 2, 0, "measured")
    assert run.cells == simulate(schedule).cells
