"""`Schedule.needs` is the one dependency rule: when it is changed, all that depends on it changes with it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dryvine.comm.pending import Pending
from dryvine.parallel.executor import Batch, EdgeWire, Executor
from dryvine.parallel.flow_control import rank_program
from dryvine.parallel.overlap import ORDERS
from dryvine.parallel.schedule.check import check
from dryvine.parallel.schedule.costs import Costs
from dryvine.parallel.schedule.draw.html import as_html
from dryvine.parallel.schedule.ir import Op, Schedule
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.notation import from_csv
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.search.anneal import TimedRows
from dryvine.parallel.schedule.search.exact import solve
from dryvine.parallel.schedule.search.fold import Pipe, fold, unfold
from dryvine.parallel.schedule.simulate import simulate
from dryvine.parallel.schedule.table import build
from dryvine.parallel.stage import Stage, StepResult
from dryvine.parallel.streams import CpuStreams

ROOT = Path(__file__).resolve().parents[2]

# Rank 0 asks for a gradient before it sends what that gradient needs: a cyclic wait.
CYCLIC = "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n"


@pytest.fixture
def no_gradients_between_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rule: a backward needs its own forward and nothing else."""

    def needs(self: Schedule, op: Op) -> tuple[Op, ...]:
        s, m, r = op.stage, op.microbatch, op.route
        if op.kind == "F":
            return (Op("F", s - 1, m, r),) if s else ()
        return (Op("I" if op.kind == "W" else "F", s, m, r),)

    monkeypatch.setattr(Schedule, "needs", needs)


def test_the_rule_as_it_is() -> None:
    whole, split = build("one_f_one_b", 3, 4), build("zb1p", 3, 4)
    assert whole.needs(Op("F", 0, 2)) == ()
    assert whole.needs(Op("F", 1, 2)) == (Op("F", 0, 2),)
    assert whole.needs(Op("B", 1, 2)) == (Op("F", 1, 2), Op("B", 2, 2))
    assert split.needs(Op("I", 1, 2)) == (Op("F", 1, 2), Op("I", 2, 2))
    assert whole.needs(Op("B", 2, 2)) == (Op("F", 2, 2),)
    assert split.needs(Op("W", 1, 2)) == (Op("I", 1, 2),)
    with pytest.raises(ScheduleError, match="cyclic wait"):
        check(from_csv(CYCLIC))


@pytest.mark.usefixtures("no_gradients_between_stages")
def test_checker_simulator_and_drawing_follow_the_rule() -> None:
    schedule = from_csv(CYCLIC)
    check(schedule)
    timeline = simulate(schedule, Costs(P2P=0.5))
    assert [[cell.start for cell in row] for row in timeline.cells] == [[0, 1, 3, 4], [1.5, 4.5, 5.5, 7.5]]
    hovers = re.search(r"const ops=(\{.*?\}),tip=", as_html([timeline]))
    assert hovers is not None
    assert json.loads(hovers[1])["t0-0B1"]["needs"] == ["t0-0F1"]


@pytest.mark.usefixtures("no_gradients_between_stages")
@pytest.mark.parametrize("name", ["zb1p", "dualpipe", "dualpipev"])
def test_programs_follow_the_rule(name: str) -> None:
    for steps in lower(build(name, 2, 4)).ranks:
        edges = [edge for step in steps for edge in step.inputs + step.outputs if edge]
        assert {edge.direction for edge in edges} == {"down"}
        assert not any(step.inputs[i] for step in steps for i, op in enumerate(step.slot) if op.kind != "F")


@dataclass
class Nothing:
    """A phase that makes an empty state."""

    name: str = "dense"
    layer: str = "layers.0"
    stream: Any = "compute"

    def forward(self, state: Any, flight: Any) -> Pending[Any]:
        return Pending.done(())

    def backward(self, grads: Any, flight: Any) -> StepResult:
        return StepResult(Pending.done(()), [])


@dataclass
class Log:
    """A wire that only counts, by direction."""

    sent: list[str] = field(default_factory=list)
    received: list[str] = field(default_factory=list)

    def send(self, tensors: Any, target: int, channel: tuple[int, str], label: str = "") -> Pending[None]:
        self.sent.append(channel[1])
        return Pending.done(None)

    def receive(self, like: Any, source: int, channel: tuple[int, str], label: str = "") -> Pending[Any]:
        self.received.append(channel[1])
        return Pending.done(())


def messages(rank: int) -> Log:
    """Those of a rank of 1F1B on three ranks with two microbatches."""
    program, wire = rank_program(lower(build("one_f_one_b", 3, 2)), rank), Log()
    stages = {rank: Stage(rank, [Nothing()])}
    executor = Executor(program, stages, EdgeWire(wire, lambda edge: ()), CpuStreams, ORDERS["cpu"])
    executor.run(Batch([torch.empty(0)] * 2, 1.0))
    return wire


def test_the_executor_sends_what_the_rule_says() -> None:
    wire = messages(1)
    assert sorted(wire.sent) == sorted(wire.received) == ["down", "down", "up", "up"]


@pytest.mark.usefixtures("no_gradients_between_stages")
def test_the_executor_follows_the_rule() -> None:
    wire = messages(1)
    assert wire.sent == wire.received == ["down", "down"]


@pytest.mark.usefixtures("no_gradients_between_stages")
@pytest.mark.parametrize(("name", "mirrored", "real"), [("dualpipe", True, 30.2), ("dualpipev", False, 64.5)])
def test_the_annealing_follows_the_rule(name: str, mirrored: bool, real: float) -> None:
    """`real`: the span with the rule as it is."""
    costs = Costs(I=1.3, W=0.7, P2P=0.4)
    schedule = build(name, 4, 8)
    pipe = Pipe(2, 4, 99, costs, mirrored) if mirrored else Pipe(4, 8, 99, costs, mirrored)
    timed = TimedRows(pipe, fold(schedule))
    assert timed.span == pytest.approx(simulate(schedule, costs).span)
    assert timed.span < real - 1


@pytest.mark.usefixtures("no_gradients_between_stages")
def test_the_exact_search_follows_the_rule() -> None:
    """Two ranks of a V, one microbatch: rank 1 waits for one F and then runs its six ops; 9 with the rule as it is."""
    pytest.importorskip("ortools")
    pipe = Pipe(2, 1, 2, Costs(), mirrored=False)
    best = solve(pipe, horizon=20.0, seconds=30.0)
    assert best.proven
    assert best.rows is not None
    assert best.span == simulate(unfold(pipe, best.rows, "exact")).span == 7


def test_no_other_file_names_a_neighbouring_stage() -> None:
    rooms = (path for room in ("comm", "parallel", "trainer", "launch") for path in (ROOT / room).rglob("*.py"))
    found = [path for path in rooms if re.search(r"\bstage *[-+] *1\b", path.read_text())]
    assert found == []
