"""Streams on a CPU, by a clock that only work and waiting move: when weight gradients run, what counts as exposed."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dryvine.comm.pending import Pending
from dryvine.parallel import overlap, streams
from dryvine.parallel.stage import Combine, Compute, Dispatch, Flight, Outcome, Routing, Stage, State, StepResult
from dryvine.parallel.streams import Baton, CpuStreams, Run
from dryvine.parallel.wgrad import Closure, WGrad


@dataclass
class World:
    """A clock, and what happened on it. Work takes its time on the clock; a message arrives when the clock says so."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def work(self, name: str, seconds: float = 1.0) -> Closure:
        def run() -> None:
            self.now += seconds
            self.log.append(name)

        return run

    def compute(self, name: str) -> Run:
        def run(value: Any) -> StepResult:
            self.work(name)()
            return StepResult(Pending.done(()), [])

        return run

    def sends(self, name: str, seconds: float) -> Run:
        return lambda value: StepResult(self.message(name, seconds), [])

    def message(self, name: str, seconds: float, value: Any = None) -> Pending[Any]:
        arrives = self.now + seconds
        self.log.append(f"{name} leaves")

        def finish() -> Any:
            self.now = max(self.now, arrives)
            self.log.append(f"{name} is here")
            return value

        return Pending(finish, lambda: self.now >= arrives)

    def weights(self, *names: str) -> list[Closure]:
        return [self.work(name) for name in names]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(streams, "time", SimpleNamespace(perf_counter=lambda: world.now))
    return world


def baton() -> Baton:
    return Baton(Pending.done(None))


def waiting(world: World, cpu: CpuStreams, seconds: float) -> Baton:
    """A baton whose message takes so long."""
    held = baton()
    cpu.step("comm", held, world.sends("m", seconds))
    return held


def leave(cpu: CpuStreams, closures: list[Closure]) -> None:
    """A step that does nothing but leave weight gradients; of comm, before which none is hurried."""
    cpu.step("comm", baton(), lambda value: StepResult(Pending.done(value), closures))


def test_weight_gradients_fill_a_wait_in_order_until_it_is_over(world: World) -> None:
    cpu = CpuStreams()
    held = waiting(world, cpu, 2.5)
    leave(cpu, world.weights("a", "b"))
    leave(cpu, world.weights("c", "d"))
    assert world.log == ["m leaves"]  # nothing runs before somebody waits
    cpu.step("compute", held, world.compute("next"))
    assert world.log == ["m leaves", "a", "b", "c", "m is here", "next"]
    assert cpu.exposed() == 0
    cpu.synchronise()
    assert world.log[-1] == "d"


def test_only_what_is_left_of_a_wait_is_exposed(world: World) -> None:
    cpu = CpuStreams()
    held = waiting(world, cpu, 5)
    leave(cpu, world.weights("a", "b"))
    cpu.step("compute", held, world.compute("next"))
    assert cpu.exposed() == 3
    cpu.step("comm", held, world.sends("m", 4))
    cpu.step("comm", held, world.sends("m", 1))  # a comm step waits for the one before it, too
    assert cpu.exposed() == 7
    world.work("other", 9)()
    cpu.take(held)
    assert cpu.exposed() == 7  # it came meanwhile


def test_an_arrived_message_lets_no_weight_gradient_run(world: World) -> None:
    cpu = CpuStreams()
    held = waiting(world, cpu, 1)
    leave(cpu, world.weights("a"))
    world.work("other", 2)()
    cpu.step("compute", held, world.compute("next"))
    assert world.log == ["m leaves", "other", "m is here", "next"]


def test_no_more_than_a_layer_of_this_slots_own_is_held_back(world: World) -> None:
    cpu, held = CpuStreams(), baton()
    names = [f"w{n}" for n in range(CpuStreams.LAG + 2)]
    for name in names:
        leave(cpu, world.weights(name, f"{name}'"))
    cpu.step("comm", held, world.sends("m", 0))
    assert world.log == ["m leaves"]  # a message would start late
    cpu.step("compute", held, world.compute("next"))
    assert world.log == ["m leaves", "w0", "w0'", "w1", "w1'", "m is here", "next"]


def test_weight_gradients_of_w_are_not_hurried(world: World) -> None:
    cpu, held = CpuStreams(), baton()
    brought = [f"w{n}" for n in range(CpuStreams.LAG + 3)]
    for name in brought:
        cpu.later(world.weights(name))
    cpu.step("compute", held, world.compute("next"))
    assert world.log == ["next"]
    cpu.synchronise()
    assert world.log == ["next", *brought]


class Held:
    """A weight gradient's inputs: memory that ends with the closure."""


@pytest.mark.parametrize("split", [False, True])
def test_a_weight_gradient_is_let_go_as_soon_as_it_has_run(world: World, split: bool) -> None:
    """Whether the slot made it or W brought it: the next one sees no memory of those before."""
    held, seen = [], []

    def closure() -> Closure:
        inputs = Held()
        held.append(weakref.ref(inputs))

        def run(inputs: Held = inputs) -> None:
            seen.append(sum(ref() is not None for ref in held))

        return run

    def inner(grads: Any, flight: Flight) -> StepResult:
        return StepResult(Pending.done(()), [closure() for _ in range(3)])

    phase: Any = SimpleNamespace(name="dense", layer="0", stream="compute", backward=inner)
    stage, flight = Stage(0, [phase, phase]), Flight(torch.empty(0), 1.0)
    overlap.play([overlap.backward(stage, flight, (), split)], CpuStreams(), overlap.ORDERS["cpu"])
    if split:
        overlap.play([overlap.weights(flight)], CpuStreams(), overlap.ORDERS["cpu"])
    assert seen == [6, 5, 4, 3, 2, 1]


def test_what_w_brought_runs_before_what_the_slot_must_not_hold_back(world: World) -> None:
    cpu, held = CpuStreams(), baton()
    cpu.later(world.weights("w0"))
    cpu.later(world.weights("w1"))
    for n in range(CpuStreams.LAG + 1):
        leave(cpu, world.weights(f"own{n}"))
    cpu.step("compute", held, world.compute("next"))
    assert world.log == ["w0", "w1", "own0", "next"]


@pytest.mark.parametrize("when", ["waiting", "synchronise", "beyond"])
def test_what_a_weight_gradient_raises_is_raised_where_it_runs(world: World, when: str) -> None:
    def broken() -> None:
        raise ArithmeticError("no such gradient")

    cpu = CpuStreams()
    held = waiting(world, cpu, 1) if when == "waiting" else baton()
    for _ in range(CpuStreams.LAG + 1):
        leave(cpu, [broken])
    with pytest.raises(ArithmeticError, match="no such gradient"):
        cpu.synchronise() if when == "synchronise" else cpu.step("compute", held, world.compute("next"))


# ---- whole ops


@dataclass
class Link:
    """A dispatcher that sends nothing, slowly."""

    world: World
    counts: float = 3.0
    rows: float = 2.0

    def plan_routing(self, experts: torch.Tensor, label: str = "") -> Pending[Any]:
        assert label == "0, microbatch 7"
        return self.world.message("routing", self.counts, "a handle")

    def dispatch(self, rows: tuple[torch.Tensor, ...], pairs: Any, handle: Any) -> Pending[Any]:
        assert handle == "a handle"
        return self.world.message("dispatch", self.rows, rows if pairs is None else (*rows, pairs))

    def combine(self, rows: torch.Tensor, pairs: Any, handle: Any) -> Pending[Any]:
        assert handle == "a handle"
        return self.world.message("combine", self.rows, (rows,) if pairs is None else (rows, pairs))


def layer(world: World, wgrad: WGrad) -> Stage:
    """One routed layer of scalars; its compute steps leave a weight gradient each."""

    def attention(state: State, flight: Flight) -> Outcome:
        world.work("attention")()
        (x,) = state
        return Outcome((x, mark(x, "attention"), x, torch.zeros(1, 1, dtype=torch.int64)), {})

    def experts(state: State, flight: Flight) -> Outcome:
        world.work("experts")()
        return Outcome((mark(state[0] * state[1], "experts"),), {})

    def mark(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x * 1
        if y.requires_grad:
            y.register_hook(lambda _: wgrad.put(world.work(f"W of {name}")))
        return y

    link: Any = Link(world)
    first, last = Compute("attention", "0", attention, wgrad), Compute("experts", "0", experts, wgrad, through=1)
    return Stage(0, [first, Routing("0", link), Dispatch("0", link), last, Combine("0", link)])


X = torch.ones(1, 1)


def new_flight() -> Flight:
    return Flight(torch.empty(0), 1.0, microbatch=7)


def in_flight(stage: Stage) -> Flight:
    flight = new_flight()
    overlap.play([overlap.forward(stage, flight, (X,))], CpuStreams(), None)
    return flight


def test_the_wait_for_a_routing_is_filled_and_what_is_left_of_it_is_exposed(world: World) -> None:
    stage, cpu = layer(world, WGrad()), CpuStreams()
    cpu.later(world.weights("w0", "w1"))
    overlap.play([overlap.forward(stage, new_flight(), (X,))], cpu, overlap.ORDERS["cpu"])
    expected = ["attention", "routing leaves", "w0", "w1", "routing is here", "dispatch leaves", "dispatch is here"]
    assert world.log == [*expected, "experts", "combine leaves", "combine is here"]
    assert cpu.exposed() == 1 + 2 + 2


def test_without_an_order_ops_run_one_by_one_and_hide_nothing(world: World) -> None:
    stage = layer(world, WGrad())
    behind, cpu = in_flight(stage), CpuStreams()
    world.log.clear()
    new = overlap.forward(stage, new_flight(), (X,))
    overlap.play([new, overlap.backward(stage, behind, (X,), split=False)], cpu, None)
    messages = [entry for entry in world.log if "leaves" in entry or "is here" in entry]
    sent = ["routing", "dispatch", "combine", "dispatch", "combine"]  # by F, and by B as backward of combine, dispatch
    assert messages == [f"{name} {what}" for name in sent for what in ("leaves", "is here")]
    assert [entry for entry in world.log if entry.startswith("W")] == ["W of experts", "W of attention"]
    assert world.log.index("W of experts") < len(world.log) - 3  # at once, not under the next message
    assert cpu.exposed() == 3 + 4 * 2
    assert not cpu.fillers


def test_a_pair_hides_what_it_can_with_the_same_weight_gradients(world: World) -> None:
    stage = layer(world, WGrad())
    behind, cpu = in_flight(stage), CpuStreams()
    world.log.clear()
    new = overlap.forward(stage, new_flight(), (X,))
    overlap.play([new, overlap.backward(stage, behind, (X,), split=False)], cpu, overlap.ORDERS["cpu"])
    assert world.log[:3] == ["dispatch leaves", "attention", "routing leaves"]  # combine(B) is a dispatch
    assert [entry for entry in world.log if entry.startswith("W")] == ["W of experts", "W of attention"]
    assert cpu.exposed() < 3 + 4 * 2


def test_i_leaves_its_weight_gradients_to_w(world: World) -> None:
    stage = layer(world, WGrad())
    behind, cpu = in_flight(stage), CpuStreams()
    overlap.play([overlap.backward(stage, behind, (X,), split=True)], cpu, overlap.ORDERS["cpu"])
    assert not [entry for entry in world.log if entry.startswith("W")]
    overlap.play([overlap.weights(behind)], cpu, overlap.ORDERS["cpu"])
    assert [entry for entry in world.log if entry.startswith("W")] == ["W of experts", "W of attention"]
    assert not behind.wgrads


@pytest.mark.parametrize(
    ("waits", "covers", "left"),
    [
        ([(0, 2), (5, 6)], [], 3),
        ([(0, 2), (5, 6)], [(0, 2), (5, 6)], 0),
        ([(0, 2), (5, 6)], [(1, 5.25)], 1.75),  # one cover over two waits
        ([(0, 10)], [(1, 2), (3, 3), (4, 6), (9, 12)], 6),
        ([(3, 4), (4, 8)], [(0, 1), (1, 3.5), (7, 7.5)], 4),
    ],
)
def test_a_wait_is_exposed_where_no_weight_gradient_runs(waits: Any, covers: Any, left: float) -> None:
    """Streams: times are the device's."""
    assert streams.uncovered(waits, covers) == left
