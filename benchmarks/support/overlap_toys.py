"""Stages whose compute and communication take set times, for benchmarks/overlap/pairs.py. Comm phases are real ones.

On a CPU a compute phase sleeps, so that two cores serve any number of ranks, and the link is a clock: one message at a
time, each for a set time, without using a core. On a GPU compute is GEMMs and a message is a copy to the host by the
copy engine, on whatever stream the executor chose.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dryvine.comm.pending import Pending
from dryvine.parallel.stage import (
    Combine,
    Dispatch,
    Flight,
    Grads,
    Phase,
    Routing,
    Stage,
    State,
    StepResult,
    StreamName,
)
from dryvine.parallel.wgrad import Closure

PIECES = {"attention": 5, "experts": 2}  # Linears of a phase, so closures of its weight gradient


@dataclass(frozen=True)
class Handle:
    counts: tuple[int, ...] = (1,)


@dataclass
class Span:
    """A measured piece of work, for the picture. Seconds."""

    stream: str
    name: str
    start: float
    end: float


@dataclass
class Sleeper:
    """CPU time: compute sleeps; the link is busy until a time and serves in order."""

    spans: list[Span] = field(default_factory=list)
    busy_until: float = 0.0

    def spend(self, seconds: float, name: str) -> None:
        start = time.perf_counter()
        time.sleep(seconds)
        self.spans.append(Span("compute", name, start, time.perf_counter()))

    def message(self, seconds: float, name: str, value: Any) -> Pending[Any]:
        start = max(time.perf_counter(), self.busy_until)
        end = self.busy_until = start + seconds
        self.spans.append(Span("comm", name, start, end))

        def finish() -> Any:
            time.sleep(max(0.0, end - time.perf_counter()))
            return value

        return Pending(finish, lambda: time.perf_counter() >= end)


class Device:
    """GPU time: GEMMs and copies to pinned memory, sized once so that each takes a tenth of a millisecond."""

    UNIT = 1e-4

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        self.host = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
        self.there = torch.empty(1 << 26, dtype=torch.uint8, device="cuda")
        self.rows = max(128, int(4096 * self.UNIT / self._time(lambda: self.a @ self.a)) // 128 * 128)
        self.size = int((1 << 26) * self.UNIT / self._time(lambda: self.host.copy_(self.there, non_blocking=True)))
        self.gemm_s = self._time(self._gemm)
        self.copy_s = self._time(self._copy)

    def spend(self, seconds: float, name: str) -> None:
        for _ in range(round(seconds / self.gemm_s)):
            self._gemm()

    def message(self, seconds: float, name: str, value: Any) -> Pending[Any]:
        for _ in range(round(seconds / self.copy_s)):
            self._copy()
        return Pending.done(value)

    def _gemm(self) -> None:
        torch.mm(self.a[: self.rows], self.a)

    def _copy(self) -> None:
        self.host[: self.size].copy_(self.there[: self.size], non_blocking=True)

    @staticmethod
    def _time(run: Callable[[], Any], times: int = 50) -> float:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / times


class Nothing:
    """Compute and messages that take no time, for what the host alone takes."""

    def spend(self, seconds: float, name: str) -> None: ...

    def message(self, seconds: float, name: str, value: Any) -> Pending[Any]:
        return Pending.done(value)


Clockwork = Sleeper | Device | Nothing


@dataclass(frozen=True)
class Times:
    """Seconds of one phase: F, I and W of attention and of experts each take `phase`; a message takes `message`."""

    phase: float
    message: float


class Toy:
    """A compute phase that takes its time and passes tensors on in the shapes that its neighbours expect."""

    stream: StreamName = "compute"

    def __init__(self, name: str, layer: str, times: Times, clockwork: Clockwork) -> None:
        self.name, self.layer, self.times, self.clockwork = name, layer, times, clockwork

    def forward(self, state: State, flight: Flight) -> Pending[State]:
        self._spend("F")
        x, *rest = state
        return Pending.done((x, x, x, x) if self.name == "attention" else (x, rest[0]))

    def backward(self, grads: Grads, flight: Flight) -> StepResult:
        self._spend("I")
        dx = grads[0]
        return StepResult(Pending.done((dx,) if self.name == "attention" else (dx, dx, dx)), self.closures())

    def closures(self) -> list[Closure]:
        pieces = PIECES[self.name]
        return [lambda: self._spend("W", 1 / pieces)] * pieces

    def _spend(self, kind: str, part: float = 1.0) -> None:
        self.clockwork.spend(self.times.phase * part, f"{self.name}({kind})")


class End:
    """Where tensors come from and where they end: the embedding and the loss, which take no time here."""

    stream: StreamName = "compute"

    def __init__(self, name: str, x: Tensor) -> None:
        self.name, self.layer, self.x = name, name, x

    def forward(self, state: State, flight: Flight) -> Pending[State]:
        return Pending.done((self.x,) if self.name == "embed" else ())

    def backward(self, grads: Grads, flight: Flight) -> StepResult:
        return StepResult(Pending.done((self.x,) if self.name == "head" else ()), [])


class Link:
    """A `Dispatcher` whose every message takes the same time on the clockwork's link."""

    def __init__(self, times: Times, clockwork: Clockwork) -> None:
        self.times, self.clockwork = times, clockwork

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[Handle]:
        return Pending.done(Handle())

    def dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: Handle) -> Pending[tuple[Tensor, ...]]:
        forward = pairs is not None
        value = rows if pairs is None else (*rows, pairs)
        return self.clockwork.message(self.times.message, "dispatch(F)" if forward else "combine(B)", value)

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: Handle) -> Pending[tuple[Tensor, ...]]:
        value = (rows,) if pairs is None else (rows, pairs)
        return self.clockwork.message(self.times.message, "combine(F)" if pairs is None else "dispatch(B)", value)


def toy_stage(number: int, layers: int, times: Times, clockwork: Clockwork, stages: int = 0) -> Stage:
    """A stage of routed layers; the state between stages is one tensor. Stage 0 of `stages` begins with an embedding,
    the last one ends with a head; with `stages` 0 the caller feeds it."""
    link = Link(times, clockwork)
    phases: list[Phase] = [End("embed", torch.zeros(1))] if stages and number == 0 else []
    for name in (f"layers.{number * layers + i}" for i in range(layers)):
        phases += [Toy("attention", name, times, clockwork), Routing(name, link), Dispatch(name, link)]
        phases += [Toy("experts", name, times, clockwork), Combine(name, link)]
    return Stage(number, phases + ([End("head", torch.zeros(1))] if number == stages - 1 else []))


def toy_flight(stage: Stage) -> Flight:
    """A microbatch that has been through F, as far as the toys can tell."""
    return Flight(torch.zeros(1), 1.0, handles={phase.layer: Handle() for phase in stage.phases})
