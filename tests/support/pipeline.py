"""A toy pipeline for tests of the executor: stages each of its own width, a reference, and ranks that play.

A stage is attention, dispatch, experts, combine: two Linears with tanh, and two messages to no other rank, which double
what they carry and are late, so that pairs have something to hide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.pending import Pending
from dryvine.comm.wire import P2PWire, Wire
from dryvine.parallel.executor import Batch, EdgeWire, Executor
from dryvine.parallel.flow_control import rank_program
from dryvine.parallel.overlap import ORDERS
from dryvine.parallel.schedule.ir import Edge, Schedule, Slot
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.stage import Compute, Flight, Grads, Outcome, Stage, State, StepResult
from dryvine.parallel.streams import CpuStreams
from dryvine.parallel.wgrad import WGrad
from dryvine.trainer.model.linear import linear
from dryvine.trainer.tensors.weight import Weight

CPU = torch.device("cpu")
Grid = dict[str, np.ndarray]


@dataclass
class Late:
    """A comm phase whose result has not arrived the first two times that somebody asks."""

    name: str
    layer: str
    stream: Any = "comm"

    def forward(self, state: State, flight: Flight) -> Pending[State]:
        return _late(tuple(2 * t for t in state))

    def backward(self, grads: Grads, flight: Flight) -> StepResult:
        return StepResult(_late(tuple(2 * t for t in grads if t is not None)), [])


def _late(value: tuple[Tensor, ...]) -> Pending[Any]:
    asked: list[None] = []

    def ready() -> bool:
        asked.append(None)
        return len(asked) > 2

    return Pending(lambda: value, ready)


def widths(stages: int) -> list[int]:
    """What enters stage s has width [s]; each its own, so that a message on a wrong edge does not fit."""
    return [3 + s for s in range(stages + 1)]


def weights(stages: int) -> dict[str, Tensor]:
    """Two a stage, the same on every rank."""
    found = {}
    for s, (narrow, wide) in enumerate(pairwise(widths(stages))):
        generator = torch.Generator().manual_seed(s)
        found[f"{s}.attention"] = torch.randn(narrow, narrow, generator=generator) / 2
        found[f"{s}.experts"] = torch.randn(wide, narrow, generator=generator) / 2
    return found


def tokens(microbatches: int, rows: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, widths(0)[0], generator=generator) for _ in range(microbatches)]


def reference(stages: int, batch: list[Tensor]) -> tuple[list[float], Grid]:
    """Losses of each microbatch and gradients of their mean, by autograd over the whole model."""
    held = {name: w.clone().requires_grad_() for name, w in weights(stages).items()}
    losses = []
    for x in batch:
        for s in range(stages):
            x = 2 * torch.tanh(x @ held[f"{s}.attention"].t())
            x = 2 * torch.tanh(x @ held[f"{s}.experts"].t())
        losses.append(x.square().mean())
    torch.stack(losses).mean().backward()
    return [float(loss.detach()) for loss in losses], {
        name: w.grad.numpy() for name, w in held.items() if w.grad is not None
    }


@dataclass
class Report:
    """The results of one run of a schedule on one rank."""

    losses: list[float]
    grads: Grid
    timeline: list[tuple[Slot, float, float]]
    blocks: int  # receive buffers at the end


class Deaf:
    """A wire whose far end is late: nothing that is sent leaves before somebody waits for it."""

    def __init__(self) -> None:
        self.under_way = self.peak = 0

    def send(self, tensors: Any, target: int, channel: Any, label: str = "") -> Pending[None]:
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)

        def gone() -> None:
            self.under_way -= 1

        return Pending(gone, lambda: False)

    def receive(self, like: Any, source: int, channel: Any, label: str = "") -> Pending[Any]:
        return Pending.done(tuple(torch.zeros(t.shape) for t in like))


@dataclass
class Toy:
    """One rank's stages, and the executor of a schedule on them."""

    schedule: Schedule
    rank: int
    woven: bool = True
    held: dict[str, Weight] = field(default_factory=dict)
    rows: int = 0  # of a microbatch, in this step
    wire: Wire | None = None  # None: gloo's

    def __post_init__(self) -> None:
        wgrad = WGrad()
        own = self.schedule.stages_of(self.rank)
        self.held = {n: Weight(w) for n, w in weights(self.schedule.stages).items() if int(n.split(".")[0]) in own}
        for weight in self.held.values():
            weight.queue = wgrad.put
        if self.wire is None:
            layout = Layout(pp=len(self.schedule.ranks), routes=len(self.schedule.routes))
            self.wire = P2PWire(make_mesh(layout, CPU, timedelta(seconds=60)))
        stages = {s: self._stage(s, wgrad) for s in own}
        order = ORDERS["cpu"] if self.woven else None
        program = rank_program(lower(self.schedule), self.rank)
        self.executor = Executor(program, stages, EdgeWire(self.wire, self._shape), CpuStreams, order)

    def run(self, batch: list[Tensor], training: bool = True) -> Report:
        self.rows = batch[0].shape[0]
        for weight in self.held.values():
            weight.main_grad = None
        played = self.executor.run(Batch(batch, 1 / len(batch), training))
        grads = {n: w.main_grad.numpy().copy() for n, w in self.held.items() if w.main_grad is not None}
        losses = [float(loss) for loss in played.losses.get("loss", [])]
        blocks = len(self.wire.buffers.blocks) if isinstance(self.wire, P2PWire) else 0
        return Report(losses, grads, played.timeline, blocks)

    def _shape(self, edge: Edge) -> State:
        width = widths(self.schedule.stages)[edge.stage + (edge.direction == "up")]
        return (torch.empty(self.rows, width, device="meta"),)

    def _stage(self, number: int, wgrad: WGrad) -> Stage:
        first, last = number == 0, number + 1 == self.schedule.stages
        inner, outer = self.held[f"{number}.attention"], self.held[f"{number}.experts"]

        def attention(state: State, flight: Flight) -> Outcome:
            (x,) = (flight.tokens,) if first else state
            return Outcome((torch.tanh(linear(x, inner)),), {})

        def experts(state: State, flight: Flight) -> Outcome:
            return Outcome((torch.tanh(linear(state[0], outer)),), {})

        def head(state: State, flight: Flight) -> Outcome:
            return Outcome((), {"loss": state[0].square().mean()})

        layer = f"layers.{number}"
        phases = [
            Compute("attention", layer, attention, wgrad), Late("dispatch", layer),
            Compute("experts", layer, experts, wgrad), Late("combine", layer),
        ]  # fmt: skip
        return Stage(number, [*phases, Compute("head", "head", head, wgrad)] if last else phases)


def play(rank: int, schedule: Schedule, batches: list[list[Tensor]], training: bool, woven: bool) -> list[Report]:
    """On one rank: the schedule once for each batch, by one executor. For `local.run`."""
    toy = Toy(schedule, rank, woven)
    return [toy.run(batch, training) for batch in batches]


def total(reports: list[Report]) -> Grid:
    """Gradients summed over the copies of a stage."""
    found: Grid = {}
    for name, grad in (item for report in reports for item in report.grads.items()):
        found[name] = found[name] + grad if name in found else grad
    return found
