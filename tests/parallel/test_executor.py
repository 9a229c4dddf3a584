"""The executor against plain autograd, on every schedule; what it may reorder, and what it holds."""

from __future__ import annotations

import random
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dryvine.comm import local
from dryvine.comm.pending import Pending
from dryvine.comm.wire import ReceiveBuffers
from dryvine.parallel import overlap
from dryvine.parallel.executor import Batch, EdgeWire, Executor, Played, PlayedTimes
from dryvine.parallel.flow_control import AHEAD, posts, rank_program
from dryvine.parallel.overlap import ORDERS
from dryvine.parallel.schedule.check import check
from dryvine.parallel.schedule.ir import Op, Schedule, Slot
from dryvine.parallel.schedule.lower import forward_only, lower
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.simulate import simulate
from dryvine.parallel.schedule.table import SCHEDULES, build
from dryvine.parallel.stage import Flight, Stage, StepResult
from dryvine.parallel.streams import CpuStreams
from tests.support.pipeline import Deaf, Report, play, reference, tokens, total


def run(schedule: Schedule, *rows: int, training: bool = True, woven: bool = True) -> list[list[Report]]:
    """The reports of each rank, for one step after another with microbatches of so many rows."""
    batches = [tokens(schedule.microbatches, n, seed) for seed, n in enumerate(rows)]
    return local.run(play, len(schedule.ranks), schedule, batches, training, woven, deadline=60)


def assert_trains(schedule: Schedule, *rows: int) -> list[list[Report]]:
    reports = run(schedule, *rows)
    for step, n in enumerate(rows):
        losses, grads = reference(schedule.stages, tokens(schedule.microbatches, n, step))
        found = total([rank[step] for rank in reports])
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            np.testing.assert_allclose(found[name], grad, rtol=1e-4, atol=1e-6 * abs(grad).max(), err_msg=name)
        heard = sorted(loss for rank in reports for loss in rank[step].losses)
        np.testing.assert_allclose(heard, sorted(losses), rtol=1e-5)
    return reports


# ---- every schedule trains like one process


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_trains_like_one_process(name: str, pp: int) -> None:
    """Two steps of one executor, with other shapes in each, and every edge with a shape of its own."""
    schedule = build(name, pp, 2 * pp)
    reports = assert_trains(schedule, 2, 5)
    for rank, slots in enumerate(schedule.ranks):
        for report in reports[rank]:
            assert_in_order(report, slots)


def assert_in_order(report: Report, slots: tuple[Slot, ...]) -> None:
    assert tuple(slot for slot, _, _ in report.timeline) == slots
    times = [t for _, start, end in report.timeline for t in (start, end)]
    assert times == sorted(times)


def test_schedule_from_a_file_trains(tmp_path: Path) -> None:
    rows = [
        "0F0,,0F1,(0F2;0I0)OVERLAP_F_I,(0F3;0W0)OVERLAP_F_W,0B1,(0B2;0B3)OVERLAP_B_B",
        ",1F0,1I0,(1F1;1W0)OVERLAP_F_W,1B1,(1F2;1F3)OVERLAP_F_F,1I2,(1I3;1W2)OVERLAP_I_W,1W3",
    ]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    schedule = build(f"file:{tmp_path}/mine.csv", 2, 4)
    check(schedule)
    assert_trains(schedule, 3)


def paired(schedule: Schedule, seed: int) -> Schedule:
    """The schedule with neighbouring slots joined wherever a coin says so and the checker agrees."""
    coin = random.Random(seed)
    rows = [list(row) for row in schedule.ranks]
    for row in rows:
        for i in reversed(range(len(row) - 1)):
            if coin.random() < 0.6 and len(row[i]) == len(row[i + 1]) == 1:
                apart = row[i : i + 2]
                row[i : i + 2] = [row[i] + row[i + 1]]
                try:
                    check(replace(schedule, ranks=tuple(map(tuple, rows))))
                except ScheduleError:
                    row[i : i + 1] = apart
    return replace(schedule, ranks=tuple(map(tuple, rows)))


PAIRED = [paired(build(name, 2, 8), seed) for seed, name in enumerate(("gpipe", "zb1p", "zbv", "dualpipe"))]


@pytest.mark.parametrize("schedule", PAIRED, ids=lambda s: s.name)
def test_any_pairs_train_like_one_process(schedule: Schedule) -> None:
    assert_trains(schedule, 3)


def test_those_pairs_are_of_all_kinds() -> None:
    kinds = {"".join(sorted(op.kind for op in slot)) for s in PAIRED for row in s.ranks for slot in row}
    assert kinds >= {"FF", "BF", "BB", "IW", "FW", "FI"}


def test_weaving_a_pair_does_not_change_a_bit() -> None:
    woven, plain = (total([r[0] for r in run(PAIRED[3], 4, woven=w)]) for w in (True, False))
    for name, grad in woven.items():
        np.testing.assert_array_equal(grad, plain[name], err_msg=name)


@pytest.mark.parametrize("name", ["interleaved", "dualpipe", "dualpipev"])
def test_forwards_alone(name: str) -> None:
    schedule = forward_only(build(name, 2, 4))
    losses, _ = reference(schedule.stages, tokens(4, 3))
    reports = [rank[0] for rank in run(schedule, 3, training=False)]
    np.testing.assert_allclose(sorted(x for r in reports for x in r.losses), sorted(losses), rtol=1e-5)
    assert not any(r.grads for r in reports)


# ---- the order inside a pair


@dataclass
class Traced:
    """A phase that logs (track, number, what happened), and hands on its number in the stage."""

    name: str
    layer: str
    stream: Any
    log: list[tuple[int, int, str]]
    track: int
    number: int

    def forward(self, state: Any, flight: Any) -> Pending[Any]:
        return self._step(state)

    def backward(self, grads: Any, flight: Any) -> StepResult:
        return StepResult(self._step(grads), [])

    def _step(self, came: Any) -> Pending[Any]:
        self.log.append((self.track, self.number, "start"))
        assert came == () or came[0] == self.track, "another track's state"

        def finish() -> Any:
            self.log.append((self.track, self.number, "used"))
            return self.track, self.number

        return Pending(finish)


STREAM = {"routing": "comm", "dispatch": "comm", "combine": "comm"}
MOE = ("attention", "routing", "dispatch", "experts", "combine")
LAYERS = [MOE, ("dense",), ("embed",), ("head",), ("attention", "dense")]


@st.composite
def stages_of_phases(draw: st.DrawFn) -> list[tuple[str, str]]:
    layers = draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=5))
    return [(name, f"layers.{i}") for i, layer in enumerate(layers) for name in layer]


def trace(kinds: str, stages: list[list[tuple[str, str]]], order: str) -> tuple[list[tuple[int, int, str]], list[Any]]:
    log: list[tuple[int, int, str]] = []
    tracks = []
    for n, (kind, phases) in enumerate(zip(kinds, stages, strict=True)):
        numbered = enumerate(phases)
        stage = Stage(n, [Traced(name, at, STREAM.get(name, "compute"), log, n, i) for i, (name, at) in numbered])
        flight = Flight(torch.empty(0), 1.0)
        made = overlap.forward(stage, flight, ()) if kind == "F" else overlap.backward(stage, flight, (), kind == "I")
        tracks.append(made)
    return log, overlap.play(tracks, CpuStreams(), ORDERS[order])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["FB", "BF", "FF", "BB", "FI", "II", "IB"]), st.sampled_from(["cpu", "cuda"]), st.data())
def test_each_track_of_a_pair_keeps_its_own_order(kinds: str, order: str, data: st.DataObject) -> None:
    stages = [data.draw(stages_of_phases()) for _ in kinds]
    log, ends = trace(kinds, stages, order)
    for track, (kind, phases) in enumerate(zip(kinds, stages, strict=True)):
        forward = list(range(len(phases)))
        steps = forward if kind == "F" else [n for n in reversed(forward) if phases[n][0] != "routing"]
        expected = [(step, what) for step in steps for what in ("start", "used")]
        assert [(step, what) for t, step, what in log if t == track] == expected
        assert ends[track] == (track, steps[-1])


def stands_still(log: list[tuple[int, int, str]], names: list[str], order: str) -> float:
    """How long compute waits when every step takes 1, and routing no time. On a CPU the caller computes, and waits for
    what it hands on; on a GPU it only queues, except in routing, and each stream runs what it was given in order."""
    free = {"host": 0.0, "compute": 0.0, "comm": 0.0}
    ended: dict[int, float] = {}  # of each track's last step
    for track, step, what in log:
        stream, ready = STREAM.get(names[step], "compute"), ended.get(track, 0.0)
        if what == "start":
            start = max(free[stream], ready, free["host"])
            ended[track] = free[stream] = start + (names[step] != "routing")
            if stream == "compute" if order == "cpu" else names[step] == "routing":
                free["host"] = ended[track]
        elif order == "cpu":
            free["host"] = max(free["host"], ended[track])
    computed = sum(STREAM.get(names[step], "compute") == "compute" for _, step, what in log if what == "start")
    return max(free.values()) - computed


def test_a_stage_is_cut_into_layers() -> None:
    """And before MTP's own head, which shares the block's name but comes after its combine."""
    phases = [("embed", "embed"), ("dense", "layers.0"), ("dense", "layers.1")]
    phases += [(name, layer) for layer in ("layers.2", "mtp.0") for name in MOE] + [("head", "mtp.0")]
    stage = Stage(0, [Traced(name, at, "compute", [], 0, i) for i, (name, at) in enumerate(phases)])
    made = overlap.forward(stage, Flight(torch.empty(0), 1.0), ())
    rows = [[step.phase for step in unit] for unit in made.units]
    assert rows == [["attention"], ["attention"], ["attention"], [*MOE], [*MOE], ["attention"]]


@pytest.mark.parametrize(("kinds", "row"), [("FB", "experts"), ("FF", "attention")])
def test_a_device_has_the_other_tracks_compute_before_its_host_waits_for_counts(kinds: str, row: str) -> None:
    stage = [(name, "layers.0") for name in MOE]
    log, _ = trace(kinds, [stage, stage], "cuda")
    started = [(track, MOE[step]) for track, step, what in log if what == "start"]
    assert started.index((1, row)) < started.index((0, "routing"))


@pytest.mark.parametrize("order", ["cpu", "cuda"])
@pytest.mark.parametrize(("kinds", "exposed"), [("FB", 0), ("FF", 1), ("BB", 1)])
def test_every_message_of_a_pair_runs_under_the_other_track(kinds: str, exposed: int, order: str) -> None:
    """But one that comes before or after all compute, where both tracks go the same way."""
    layers = 5
    stage = [(name, f"layers.{i}") for i in range(layers) for name in MOE]
    log, _ = trace(kinds, [stage, stage], order)
    assert stands_still(log, [name for name, _ in stage], order) == exposed


# ---- what a run holds and reports


@dataclass
class Watched:
    """A phase that makes nothing except a loss, the number of its microbatch, and watches the flights it has seen."""

    name: str = "dense"
    layer: str = "layers.0"
    stream: Any = "compute"
    flights: list[weakref.ref[Flight]] = field(default_factory=list)
    most: int = 0  # alive at once
    training: set[bool] = field(default_factory=set)  # what flights say

    def forward(self, state: Any, flight: Flight) -> Pending[Any]:
        self.flights.append(weakref.ref(flight))
        self.training.add(flight.training)
        self.most = max(self.most, sum(flight() is not None for flight in self.flights))
        flight.losses["loss"] = torch.tensor(float(flight.microbatch))
        return Pending.done(())

    def backward(self, grads: Any, flight: Flight) -> StepResult:
        return StepResult(Pending.done(()), [])


class Exposed(CpuStreams):
    def exposed(self) -> float:
        return 1.5


def run_alone(schedule: Schedule, rank: int, training: bool = True) -> tuple[Watched, Played]:
    """One rank's part, with others that never make it wait."""
    watched = Watched()
    stages = {stage: Stage(stage, [watched]) for stage in schedule.stages_of(rank)}
    program, wire = rank_program(lower(schedule), rank), EdgeWire(Deaf(), lambda edge: ())
    batch = Batch([torch.empty(0)] * schedule.microbatches, 1.0, training)
    return watched, Executor(program, stages, wire, Exposed, ORDERS["cpu"]).run(batch)


@pytest.mark.parametrize("name", SCHEDULES)
def test_flights_are_held_as_long_as_simulated(name: str) -> None:
    schedule = build(name, 4, 8)
    timeline = simulate(schedule)
    for rank in range(4):
        watched, _ = run_alone(schedule, rank)
        assert watched.most == timeline.held(rank)
        assert not any(flight() for flight in watched.flights)
        assert watched.training == {True}
        watched, _ = run_alone(forward_only(schedule), rank, training=False)
        assert (watched.most, watched.training) == (1, {False})


@pytest.mark.parametrize("name", ["one_f_one_b", "dualpipe"])
def test_a_run_reports_losses_with_their_microbatches_in_order(name: str) -> None:
    schedule = build(name, 4, 8)
    _, played = run_alone(schedule, 1)
    order = [op.microbatch for op in schedule.ops(1) if op.kind == "F"]
    assert played.microbatches == {"loss": order}
    assert [float(loss) for loss in played.losses["loss"]] == order
    assert tuple(slot for slot, _, _ in played.timeline) == schedule.ranks[1]
    assert played.started <= played.timeline[0][1] <= played.timeline[-1][2] <= played.ended
    assert played.exposed == 1.5


def test_times_are_read_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's take milliseconds, in which it would have nothing to do."""

    def refuse(streams: Exposed) -> float:
        raise AssertionError("read")

    monkeypatch.setattr(Exposed, "exposed", refuse)
    _, played = run_alone(build("one_f_one_b", 4, 8), 1)
    with pytest.raises(AssertionError, match="read"):
        assert played.exposed


def test_idle_is_the_time_between_slots() -> None:
    slot = (Op("F", 0, 0),)
    times = PlayedTimes([(slot, 11.0, 12.0), (slot, 14.0, 16.0)])
    played = Played(read_times=lambda: times, started=10.5, ended=17.0)
    assert played.idle == 6.5 - 3


# ---- receive buffers


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b", "zb1p", "zbv", "dualpipe"])
def test_the_pool_holds_what_the_schedule_says(name: str) -> None:
    """An input is held until its microbatch leaves the stage, a gradient for its slot; both from one slot ahead."""
    schedule = build(name, 2, 8)
    reports = run(schedule, 3, 3, 3)
    for rank, steps in enumerate(lower(schedule).ranks):
        live: set[tuple[str, int, int]] = set()
        peak = 0
        for step, edges in zip(steps, posts(steps, AHEAD), strict=True):
            live |= {(edge.direction, edge.stage, edge.microbatch) for edge in edges}
            peak = max(peak, len(live))
            for op in step.slot:
                live -= {("up", op.stage, op.microbatch)} if op.kind != "F" else set()
                live -= {("down", op.stage, op.microbatch)} if op.kind in "BW" else set()
        assert [report.blocks for report in reports[rank]] == [peak] * 3


def test_a_block_is_used_again_only_when_nothing_refers_to_it() -> None:
    pool, like = ReceiveBuffers(torch.device("cpu")), torch.empty(4, 8, device="meta")
    first, second = pool.take(like), pool.take(like)
    view = first.detach()[1:]
    place = first.data_ptr()
    del first
    third = pool.take(like)
    assert len(pool.blocks) == 3
    assert third.data_ptr() != place
    del view
    assert pool.take(like).data_ptr() == place
    del second, third
    pool.take(torch.empty(64, 64, dtype=torch.float64, device="meta"))  # fits nowhere: it takes a free block's place
    assert len(pool.blocks) == 3
    assert pool.take(torch.empty(5, dtype=torch.bfloat16, device="meta")).dtype == torch.bfloat16
    assert len(pool.blocks) == 3
