"""Where a stage's work goes: compute, communication, and weight gradients, side by side as far as the device can.

On a GPU each is a stream. A step waits for the event of the step that made its input, and for nothing else, so an
all-to-all that is called after an expert GEMM does not queue behind it; the host never waits but for the receive counts
of a layout. On a CPU compute runs in the caller, an all-to-all runs in gloo's threads, and weight gradients
fill the caller's waits for it, first come first served, so their sums keep their order and the bits do not depend on
how long a message took.

Tensors made in one stream and read in another are held until the streams meet at the end of a slot. `record_stream`
would do that for each, and leaves the allocator to find out when, at the price of memory that nobody can predict.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dryvine.comm.pending import Pending
from dryvine.parallel.stage import Grads, StepResult, StreamName
from dryvine.parallel.wgrad import Closure

Run = Callable[[Grads], StepResult]
EventPair = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass
class Baton:
    """The value that goes from step to step of one op, and what the next step must wait for."""

    value: Pending[Grads]
    stream: StreamName = "compute"  # that made it
    event: torch.cuda.Event | None = None


class Streams(Protocol):
    """One object per run of a schedule, so that what it measures is that run's."""

    def step(self, name: StreamName, baton: Baton, run: Run) -> None:
        """Call `run` on the baton's value in stream `name`, and put the result's value into the baton. What the step
        spent is held as long as another stream may use it, and its weight gradients may run from now on."""
        ...

    def later(self, closures: list[Closure]) -> None:
        """Weight gradients of W, which may run from now on, until `meet`, in the order given. Their inputs have been
        held since an earlier slot, so haste saves no memory. They belong to the streams now."""
        ...

    def take(self, baton: Baton) -> Grads:
        """The baton's value, usable in the compute stream."""
        ...

    def meet(self) -> None:
        """End of a slot: all three streams are done with what the others made."""
        ...

    def mark(self) -> None:
        """Note the time now, as compute sees it. On a GPU now is when the device gets there."""
        ...

    def marks(self) -> list[float]:
        """What `mark` noted, in seconds of this host's `time.perf_counter`. On a GPU this waits for the device."""
        ...

    def exposed(self) -> float:
        """Seconds so far in which nothing was computed because a message was waited for. On a GPU this waits for the
        device."""
        ...


@dataclass
class CpuStreams:
    """Weight gradients run while compute would wait, first come first served. Of those that a slot makes itself, at
    most `LAG` steps' worth are held back, to bound memory; those that W brings were held anyway."""

    waited: float = 0.0
    fillers: deque[deque[Closure]] = field(default_factory=deque)
    made: int = 0  # how many of the fillers, counted from the last, this slot has made
    noted: list[float] = field(default_factory=list)

    LAG = 2  # compute steps whose weight gradients may still be waiting: about one layer

    def step(self, name: StreamName, baton: Baton, run: Run) -> None:
        while name == "compute" and self.made > self.LAG:  # not before a comm step: it would start late
            self._fill()
        result = run(self.take(baton))
        baton.value, baton.stream = result.value, name
        if result.closures:
            self.later(result.closures)
            self.made += 1

    def later(self, closures: list[Closure]) -> None:
        self.fillers.append(deque(closures))

    def take(self, baton: Baton) -> Grads:
        if baton.stream == "compute":
            return baton.value.wait()
        while self.fillers and not baton.value.ready():
            self._fill()
        started = time.perf_counter()
        value = baton.value.wait()
        self.waited += time.perf_counter() - started
        return value

    def meet(self) -> None:
        while self.fillers:
            self._fill()

    def mark(self) -> None:
        self.noted.append(time.perf_counter())

    def marks(self) -> list[float]:
        return self.noted

    def exposed(self) -> float:
        return self.waited

    def _fill(self) -> None:
        """Run one closure, the oldest."""
        oldest = self.fillers[0]
        if oldest:
            oldest.popleft()()
        if not oldest:
            self.fillers.popleft()
            self.made = min(self.made, len(self.fillers))


class CudaStreams:
    """Three streams. What a step read is held until `meet`, whichever stream made it.

    Weight gradients that W brings are dealt out, one phase's for each message that compute waits for, from the moment
    when it starts to wait. All at once they would share the device with compute that is not waiting, and be over when
    it does.

    Waits are pairs of events on the compute stream. Its time between them is exposed but for what the weight gradients'
    stream covers. A comm step stands between such a pair too: in routing the host waits for counts, and what compute
    has left to do meanwhile only the device knows.
    """

    def __init__(self, device: torch.device, side: SideStreams) -> None:
        self.side = side
        self.compute = torch.cuda.current_stream(device)
        self.held: list[object] = []
        self.dealt: deque[list[Closure]] = deque()  # W's, a phase each, still to come
        self.first = _record(self.compute)
        self.waits: list[EventPair] = []
        self.fills: list[EventPair] = []
        self.noted: list[torch.cuda.Event] = []

    def step(self, name: StreamName, baton: Baton, run: Run) -> None:
        stream = self.compute if name == "compute" else self.side.comm
        with torch.cuda.stream(stream), self._timed(self.waits, self.compute) if name == "comm" else nullcontext():
            self._enter(stream, name, baton)
            value = baton.value.wait()
            self.held.append(value)
            result = run(value)
            self.held.extend(result.spent)
            made = result.value.wait()  # queues; the host goes on
        baton.value, baton.stream, baton.event = Pending.done(made), name, stream.record_event()
        if result.closures:
            self._fill(result.closures)

    def later(self, closures: list[Closure]) -> None:
        self.dealt.append(closures)

    def _fill(self, closures: list[Closure]) -> None:
        """Run them as soon as compute has done what it has been given so far."""
        self.side.wgrad.wait_stream(self.compute)
        with torch.cuda.stream(self.side.wgrad), self._timed(self.fills, self.side.wgrad):
            for closure in closures:
                closure()
        self.held.append(closures)

    def take(self, baton: Baton) -> Grads:
        self._enter(self.compute, "compute", baton)
        value = baton.value.wait()
        self.held.append(value)
        return value

    def meet(self) -> None:
        while self.dealt:
            self._fill(self.dealt.popleft())
        with self._timed(self.waits, self.compute):
            self.compute.wait_stream(self.side.comm)
        self.compute.wait_stream(self.side.wgrad)
        # Only now: comm would take back memory that wgrad reads if it had not waited for both.
        self.side.comm.wait_stream(self.compute)
        self.side.wgrad.wait_stream(self.compute)
        self.held.clear()

    def mark(self) -> None:
        self.noted.append(_record(self.compute))

    def marks(self) -> list[float]:
        """By their distance from an event whose time the host knows: one it has just waited for."""
        last = _record(self.compute)
        last.synchronize()
        now = time.perf_counter()
        return [now - mark.elapsed_time(last) / 1e3 for mark in self.noted]

    def exposed(self) -> float:
        _record(self.compute).synchronize()
        waits, fills = (
            [(self.first.elapsed_time(start), self.first.elapsed_time(end)) for start, end in spans]
            for spans in (self.waits, self.fills)
        )
        return uncovered(waits, fills) / 1e3

    @contextmanager
    def _timed(self, spans: list[EventPair], stream: torch.cuda.Stream) -> Iterator[None]:
        before = _record(stream)
        yield
        spans.append((before, _record(stream)))

    def _enter(self, stream: torch.cuda.Stream, name: StreamName, baton: Baton) -> None:
        """Wait for the baton's step if it was in the other stream."""
        if baton.stream == name:
            return
        if baton.event is None:
            # The op's input. Compute has waited for it, where another rank sent it, and for messages that have left,
            # whose memory comm may be given. Comm has waited for neither.
            stream.wait_stream(self.compute)
            return
        if name == "comm":
            stream.wait_event(baton.event)
            return
        if self.dealt:
            self._fill(self.dealt.popleft())
        with self._timed(self.waits, stream):
            stream.wait_event(baton.event)


def uncovered(waits: Sequence[tuple[float, float]], covers: Sequence[tuple[float, float]]) -> float:
    """How much of `waits` lies outside `covers`. Both are spans (start, end) that do not overlap, in order of time."""
    total, n = 0.0, 0
    for start, end in waits:
        total += end - start
        while n < len(covers) and covers[n][0] < end:
            total -= max(0.0, min(end, covers[n][1]) - max(start, covers[n][0]))
            n += 1
        n = max(n - 1, 0)  # the last may reach into the next wait
    return total


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


@dataclass(frozen=True)
class SideStreams:
    """The two streams beside compute. Communication goes first where both have work: others wait for it."""

    comm: torch.cuda.Stream
    wgrad: torch.cuda.Stream


def make_streams(device: torch.device) -> Callable[[], Streams]:
    """A maker of streams for each run on `device`; the streams are made once."""
    if device.type == "cpu":
        return CpuStreams
    side = SideStreams(torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device))
    return lambda: CudaStreams(device, side)
