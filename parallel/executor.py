"""Runs a lowered schedule: waits for what a slot needs, plays its ops, sends what they made. No schedule is named here.

A receive is posted one slot before the slot that needs it and waited for when that slot starts; a send leaves as soon
as its op has ended. Weight gradients stay in the flight of their microbatch between I and W, so W needs no queue and
no order but the schedule's. `torch.distributed.pipelining`'s runtime allows one rank per stage and runs a pair's F and
B one after the other; it is an oracle for our schedules, not our executor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dryvine.comm.api import Pending, Wire
from dryvine.parallel import overlap as weave
from dryvine.parallel.schedule.ir import Edge, Op, Schedule, Slot
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.stage import Clock, Flight, Stage, State


@dataclass(frozen=True)
class Batch:
    """One step's work for a data rank. `tokens[m]` are the sequences of microbatch m, int64 [sequences, T + extra]."""

    tokens: Sequence[Tensor]
    loss_scale: float
    training: bool = True


@dataclass
class Played:
    """What a rank did in one run of the schedule. Times are seconds of `time.perf_counter`; a slot starts when what it
    needs has arrived."""

    losses: dict[str, list[Tensor]] = field(default_factory=dict)  # name -> one scalar per microbatch that made it
    timeline: list[tuple[Slot, float, float]] = field(default_factory=list)  # slot, start, end
    started: float = 0.0
    ended: float = 0.0
    exposed: float = 0.0  # seconds stood still for the all-to-all inside ops

    @property
    def idle(self) -> float:
        """Seconds in which this rank ran no op: the measured bubble."""
        return self.ended - self.started - sum(end - start for _, start, end in self.timeline)


class Executor:
    """One rank's part of a schedule, ready to run any number of times.

    `stages` maps the numbers of this rank's stages to them; `boundary` is the state that crosses a stage boundary, as
    meta tensors; `overlap` weaves pairs (the bits are the same without).
    """

    def __init__(
        self, schedule: Schedule, rank: int, stages: dict[int, Stage], wire: Wire, boundary: State, overlap: bool
    ) -> None:
        self.schedule, self.rank, self.stages = schedule, rank, stages
        self.wire, self.boundary, self.overlap = wire, boundary, overlap
        self.program = lower(schedule)[rank]

    def run(self, batch: Batch) -> Played:
        """Play every slot once. The gradients are in the parameters' `main_grad` when it returns."""
        flights = _Flights(batch)
        arrivals: dict[tuple[str, int, int], Pending[State]] = {}  # (direction, stage, microbatch) -> its input
        played = Played(started=time.perf_counter())
        clock = flights.clock
        for number, step in enumerate(self.program):
            for ahead in self.program[number + 1 if number else 0 : number + 2]:  # the first step posts its own too
                for edge in ahead.receives:
                    arrivals[_key(edge)] = self._receive(edge)
            self._play(step.slot, flights, arrivals, played, clock)
            for edge in step.sends:
                self.wire.send(arrivals.pop(_key(edge)).wait(), edge.target, (edge.route, edge.direction))
        self.wire.drain()
        played.losses, played.exposed = flights.losses, clock.exposed
        played.ended = time.perf_counter()
        return played

    def _receive(self, edge: Edge) -> Pending[State]:
        return self.wire.receive(self.boundary, edge.source, (edge.route, edge.direction))

    def _play(
        self,
        slot: Slot,
        flights: _Flights,
        arrivals: dict[tuple[str, int, int], Pending[State]],
        played: Played,
        clock: Clock,
    ) -> None:
        inputs = [arrivals.pop(key).wait() if (key := self._input(op)) else () for op in slot]
        start = time.perf_counter()
        tracks = [self._track(op, state, flights, clock) for op, state in zip(slot, inputs, strict=True)]
        weave.play(tracks, self.overlap)
        for op, track in zip(slot, tracks, strict=True):
            result = track.take()
            if key := self._output(op):
                arrivals[key] = Pending.done(result)
            flights.land(op)
        played.timeline.append((slot, start, time.perf_counter()))

    def _track(self, op: Op, state: State, flights: _Flights, clock: Clock) -> weave.Track:
        stage, flight = self.stages[op.stage], flights[op]
        match op.kind:
            case "F":
                return weave.forward(stage, flight, state, clock)
            case "B" | "I":
                return weave.backward(stage, flight, state, clock, split=op.kind == "I")
            case "W":
                return weave.weights(flight, clock)

    def _input(self, op: Op) -> tuple[str, int, int] | None:
        if op.kind == "F" and op.stage > 0:
            return "down", op.stage, op.microbatch
        if op.kind in "BI" and op.stage + 1 < self.schedule.stages:
            return "up", op.stage, op.microbatch
        return None

    def _output(self, op: Op) -> tuple[str, int, int] | None:
        if op.kind == "F" and op.stage + 1 < self.schedule.stages:
            return "down", op.stage + 1, op.microbatch
        if op.kind in "BI" and op.stage > 0:
            return "up", op.stage - 1, op.microbatch
        return None


class _Flights:
    """The microbatches under way on this rank: made by F, dropped by B or W (by F itself when not training)."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.clock = batch, Clock()
        self.losses: dict[str, list[Tensor]] = {}
        self._open: dict[tuple[int, int], Flight] = {}

    def __getitem__(self, op: Op) -> Flight:
        key = (op.stage, op.microbatch)
        if op.kind == "F":
            batch = self.batch
            self._open[key] = Flight(batch.tokens[op.microbatch], batch.loss_scale, batch.training, self.clock)
        return self._open[key]

    def land(self, op: Op) -> None:
        key = (op.stage, op.microbatch)
        if op.kind == "F":
            for name, loss in self._open[key].losses.items():
                self.losses.setdefault(name, []).append(loss)
        if op.kind in "BW" or not self.batch.training:
            del self._open[key]


def _key(edge: Edge) -> tuple[str, int, int]:
    return edge.direction, edge.stage, edge.microbatch
