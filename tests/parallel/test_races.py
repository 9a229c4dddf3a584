"""CUDA's streams and NCCL's messages, played on the CPU: no stream reads early, writes over, or lets go too soon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch

from dryvine.comm import wire
from dryvine.comm.copy_wire import CopyWire, layout_rings, slot_bytes
from dryvine.comm.lines import Line
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.comm.pending import Pending
from dryvine.comm.wire import P2PWire, Wire
from dryvine.parallel import executor, streams
from dryvine.parallel.executor import Batch, EdgeWire, Executor
from dryvine.parallel.flow_control import channel, rank_program
from dryvine.parallel.overlap import ORDERS
from dryvine.parallel.schedule.ir import Program, Schedule
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.table import SCHEDULES, build
from dryvine.parallel.stage import Compute, Flight, Grads, Outcome, Stage, State, StepResult, StreamName
from dryvine.parallel.streams import CudaStreams, make_streams
from dryvine.parallel.wgrad import WGrad
from dryvine.trainer.config import Config
from dryvine.trainer.model.linear import linear
from dryvine.trainer.ramps import points
from dryvine.trainer.step import train_step
from dryvine.trainer.tensors.weight import Weight
from tests.support import races as support
from tests.support.rig import rig_of

Tiny = Callable[..., Config]
Kind = type[CudaStreams]
MakeWire = Callable[[support.Races, Mesh, Program], Wire]
CPU = torch.device("cpu")
FP8 = ("run.dtype=bf16", "fp8.preset=deepseek_v3")
RECOMPUTE = ('model.recompute=["norm", "mla_up", "swiglu"]',)


# ---- a pipeline of toys


@dataclass(eq=False)
class Message:
    """A comm phase that doubles what it carries."""

    name: str
    layer: str
    stream: StreamName = "comm"

    def forward(self, state: State, flight: Flight) -> Pending[State]:
        return Pending.done(tuple(2 * t for t in state))

    def backward(self, grads: Grads, flight: Flight) -> StepResult:
        return StepResult(Pending.done(tuple(2 * t for t in grads if t is not None)), [])


# A stage's phases: which stream its F and its B begin and end in.
STAGES = {
    "compute first, comm last": ("attention", "dispatch", "experts", "combine"),
    "compute first and last": ("attention", "dispatch", "experts"),
    "comm first and last": ("dispatch", "experts", "combine"),
    "comm first, compute last": ("dispatch", "experts"),
    "several layers": 3 * ("attention", "dispatch", "experts", "combine"),
}


def toy_stage(number: int, last: int, names: Sequence[str], wgrad: WGrad) -> Stage:
    def phase(name: str) -> Any:
        if name in ("dispatch", "combine"):
            return Message(name, f"layers.{number}")
        weight = Weight(torch.rand(4, 4))
        weight.queue = wgrad.put
        function = lambda state, flight: Outcome((torch.tanh(linear(state[0], weight)),), {})  # noqa: E731
        return Compute(name, f"layers.{number}", function, wgrad)

    def embed(state: State, flight: Flight) -> Outcome:
        return Outcome((flight.tokens,), {})

    def head(state: State, flight: Flight) -> Outcome:
        return Outcome((), {"loss": state[0].square().mean()})

    first = [Compute("embed", "embed", embed, wgrad)] if number == 0 else []
    end = [Compute("head", "head", head, wgrad)] if number == last else []
    return Stage(number, [*first, *map(phase, names), *end])


STATE = (torch.empty(3, 4, device="meta"),)


def nccl(races: support.Races, mesh: Mesh, program: Program) -> Wire:
    return P2PWire(mesh)


def by_copy_engine(races: support.Races, mesh: Mesh, program: Program) -> Wire:
    edges = [edge for steps in program.ranks for step in steps for edge in step.sends]
    size = slot_bytes(STATE)
    rings, _ = layout_rings({Line(edge.source, edge.target, channel(edge)): 1 for edge in edges}, size)
    links = support.Neighbours(races, mesh.rank, rings, size)
    return CopyWire(mesh.rank, links, rings, size, lambda *_: None, mesh.global_rank)


def toy_races(
    schedule: Schedule, rank: int, names: Sequence[str], overlap: bool, kind: Kind, make_wire: MakeWire
) -> Counter[str]:
    """What goes wrong on `rank` in one run of a schedule on toys."""
    with pytest.MonkeyPatch.context() as patch:
        races = support.watch(patch, rank, kind)
        mesh = make_mesh(Layout(pp=len(schedule.ranks), routes=len(schedule.routes)), CPU, timedelta(seconds=9))
        wgrad = WGrad()
        stages = {s: toy_stage(s, schedule.stages - 1, names, wgrad) for s in schedule.stages_of(rank)}
        program = lower(schedule)
        edges = EdgeWire(make_wire(races, mesh, program), lambda edge: STATE)
        order = ORDERS["cpu"] if overlap else None
        runner = Executor(rank_program(program, rank), stages, edges, make_streams(CPU), order)
        with races:
            played = runner.run(Batch([torch.rand(3, 4) for _ in range(schedule.microbatches)], 1.0))
            [loss.double() for losses in played.losses.values() for loss in losses]
    return races.found


def pipeline_races(
    schedule: Schedule, overlap: bool = True, kind: Kind = CudaStreams, make_wire: MakeWire = nccl
) -> Counter[str]:
    """What goes wrong on any rank, with stages that begin and end in either stream."""
    found: Counter[str] = Counter()
    for names in STAGES.values():
        for rank in range(len(schedule.ranks)):
            found += toy_races(schedule, rank, names, overlap, kind, make_wire)
    return found


def named(name: str, pp: int) -> Schedule:
    return build(name, pp, 2 * pp, {"interleaved": 2}.get(name, 1))


@pytest.mark.parametrize("overlap", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_message_races_a_stream(name: str, pp: int, overlap: bool) -> None:
    assert not pipeline_races(named(name, pp), overlap)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_message_by_copy_engine_races_a_stream(name: str) -> None:
    assert not pipeline_races(named(name, 2), make_wire=by_copy_engine)


# ---- training steps


def races(config: Config, rank: int = 0, kind: Kind = CudaStreams) -> Counter[str]:
    """What goes wrong in one training step of one rank."""
    with pytest.MonkeyPatch.context() as patch:
        watched = support.watch(patch, rank, kind)
        rig = rig_of(config)
        with watched:
            train_step(rig, next(points(config.batch, config.data.seq_len)))
    return watched.found


def alone(tiny: Tiny, schedule: str, *more: str) -> Config:
    return tiny("parallel.pp=1", "parallel.ep=1", f"parallel.schedule={schedule}", "batch.sequences=4", *more)


@pytest.mark.parametrize(
    "ways",
    [
        ("parallel.overlap=off",),
        ("run.dtype=bf16", *RECOMPUTE),
        pytest.param((*FP8, *RECOMPUTE), marks=pytest.mark.long),
    ],
)
def test_no_stream_races_another(tiny: Tiny, ways: Any) -> None:
    assert not races(alone(tiny, "dualpipev", *ways))


@pytest.mark.parametrize("schedule", ["zb1p", "zbv"])
def test_weight_gradients_by_themselves_race_nobody(tiny: Tiny, schedule: str) -> None:
    assert not races(alone(tiny, schedule))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("ways", [("parallel.schedule=dualpipe",), ("parallel.schedule=zb1p", *FP8)])
def test_no_message_of_a_training_step_races_a_stream(tiny: Tiny, rank: int, ways: Any) -> None:
    """Uploads, the losses, the sum of gradients over both ranks, the update and its publication included."""
    assert not races(tiny("parallel.pp=2", "parallel.ep=1", "batch.sequences=4", *ways), rank)


def test_each_wait_gets_a_phase_of_what_w_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, ran = support.watch(monkeypatch), []
    ours, baton = make_streams(CPU)(), streams.Baton(Pending.done(()))

    def note(name: str) -> None:
        ran.append(f"{name} in {watched.here.name}")

    def step(name: str) -> StepResult:
        note(name)
        return StepResult(Pending.done(()), [])

    for name in ("W1", "W2", "W3"):
        ours.later([partial(note, name)])
    steps: tuple[tuple[StreamName, str], ...] = (
        ("compute", "gate"), ("comm", "dispatch"), ("compute", "experts"), ("compute", "more"), ("comm", "combine"),
    )  # fmt: skip
    for stream, name in steps:
        ours.step(stream, baton, lambda _, name=name: step(name))
    ours.take(baton)
    ours.synchronise()
    before, after = (
        ["gate in compute", "dispatch in comm"],
        ["experts in compute", "more in compute", "combine in comm"],
    )
    assert ran == [*before, "W1 in wgrad", *after, "W2 in wgrad", "W3 in wgrad"]


class Timed(support.Event):
    """An event that the device reaches at a given time."""

    at = iter(())

    def record(self, stream: Any) -> None:
        self.ms = next(Timed.at)

    def elapsed_time(self, other: Any) -> float:
        return other.ms - self.ms


def test_times_of_the_device_are_seconds_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = support.watch(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Timed(watched))
    monkeypatch.setattr(streams.time, "perf_counter", lambda: 100.0)
    # Its start, two marks, now; then a wait from 1 s to 3 s, of which weight gradients fill half a second.
    monkeypatch.setattr(Timed, "at", iter([0.0, 1000.0, 3000.0, 4000.0, 1000.0, 3000.0, 2000.0, 2500.0]))
    ours: Any = make_streams(CPU)()
    ours.mark()
    ours.mark()
    assert ours.end() == 100.0
    assert ours.marks() == [97.0, 99.0]
    for spans in (ours.waits, ours.fills):
        with ours._timed(spans, ours.compute):
            pass
    assert ours.exposed() == 1.5


# ---- what would race is found


class Unaware(CudaStreams):
    """Comm begins an op without waiting for its input, since no step made it."""

    def _enter(self, stream: Any, name: StreamName, baton: Any) -> None:
        if baton.event is not None:
            super()._enter(stream, name, baton)


class Hasty(CudaStreams):
    """Enters a stream without waiting for the one that has the baton."""

    def _enter(self, *_: Any) -> None:
        pass


class Early(CudaStreams):
    """Starts weight gradients without waiting for what they multiply."""

    def _fill(self, closures: list[Any]) -> None:
        with torch.cuda.stream(self.side.wgrad):
            for closure in closures:
                closure()
        self.held.append(closures)


class InTurn(CudaStreams):
    """Synchronises one stream after the other, so that comm has not waited for wgrad."""

    def synchronise(self) -> None:
        for stream in (self.side.comm, self.side.wgrad):
            self.compute.wait_stream(stream)
            stream.wait_stream(self.compute)
        self.held.clear()
        self.reads.clear()


class Apart(CudaStreams):
    """Does not wait for weight gradients at the end of a slot."""

    def synchronise(self) -> None:
        self.compute.wait_stream(self.side.comm)
        self.side.comm.wait_stream(self.compute)
        self.held.clear()
        self.reads.clear()


class Generous(CudaStreams):
    """Holds nothing of what steps read."""

    def step(self, name: StreamName, baton: Any, run: Any) -> None:
        super().step(name, baton, run)
        self.held.clear()
        self.reads.clear()


class Careless(CudaStreams):
    """Lets go of what earlier steps read without waiting for the other streams."""

    def _let_go(self) -> None:
        self.held = self.held[-4:]


class Forgetful(CudaStreams):
    """Lets go of a backward's inputs at once."""

    def step(self, name: StreamName, baton: Any, run: Any) -> None:
        super().step(name, baton, lambda value: run(value)._replace(spent=()))


@pytest.mark.parametrize(
    ("kind", "overlap", "words"),
    [
        (Unaware, True, "in comm does not wait for group"),  # of what was received
        (Unaware, True, "in comm may be given what group"),  # of what was sent
        (Hasty, True, "in compute does not wait for comm"),
        (Hasty, True, "in comm does not wait for compute"),
        (Early, True, "in wgrad does not wait for"),
        (InTurn, False, "in comm may be given what wgrad"),
        (Apart, True, "in compute may be given what wgrad"),
        (Apart, True, "writes over what wgrad"),  # in a receive buffer
        (Generous, True, "in compute may be given what"),
        (Generous, True, "in comm may be given what"),
        (Careless, True, "in compute may be given what"),
        (Careless, True, "in comm may be given what"),
    ],
)
def test_streams_that_would_race_are_found(kind: Kind, overlap: bool, words: str) -> None:
    found = pipeline_races(named("dualpipe", 4), overlap, kind)
    assert any(words in fault for fault in found), found


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_received_message_that_comm_reads_too_early_is_found(name: str) -> None:
    found = pipeline_races(named(name, 2), kind=Unaware)
    assert any("in comm does not wait for group" in fault for fault in found), found


@pytest.mark.parametrize(
    ("module", "name", "broken", "words"),
    [
        (support.Work, "wait", lambda work: True, "does not wait for group"),
        (wire, "_unused", lambda memory: True, "irecv in group"),
        (executor, "_let_go", lambda leaving, limit: leaving.clear(), "may be given what group"),
    ],
    ids=["received and not waited for", "received into memory in use", "sent and let go"],
)
def test_messages_that_would_race_are_found(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, broken: Any, words: str
) -> None:
    monkeypatch.setattr(module, name, broken)
    found = pipeline_races(named("dualpipe", 4))
    assert any(words in fault for fault in found), found


@pytest.mark.parametrize(
    ("name", "broken", "words"),
    [
        ("after_caller", lambda queue: None, "does not wait for compute"),
        ("write", support.Queue.write_at_once, "writes over what compute may still read"),
    ],
    ids=["sent before it is made", "given back before it is read"],
)
def test_messages_by_copy_engine_that_would_race_are_found(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, words: str
) -> None:
    monkeypatch.setattr(support.Queue, name, broken)
    found = pipeline_races(named("dualpipe", 2), make_wire=by_copy_engine)
    assert any(words in fault for fault in found), found


def test_a_backward_that_lets_go_of_its_inputs_is_found(tiny: Tiny) -> None:
    """In FP8: in BF16 weight gradients hold what a backward read."""
    found = races(alone(tiny, "dualpipev", *FP8), kind=Forgetful)
    assert any("may be given what compute" in fault for fault in found), found
