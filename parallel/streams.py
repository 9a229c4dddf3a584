"""Where a stage's work runs: compute, communication and weight gradients side by side, as far as the device can.

On a GPU each is a CUDA stream. A step waits for the event of the step that made its input and for nothing else, so an
all-to-all that is called after an expert GEMM does not queue behind it; the host waits only for the receive counts of
a routing. On a CPU, compute runs in the caller, an all-to-all runs in gloo's threads, and weight gradients fill the
caller's waits for it. They run in the order in which they were made, so the bits do not depend on how long a message
took.

Tensors made in one stream and read in another are kept for some compute steps, until each stream has been told to wait
for what the others were then given. The alternative, `record_stream` on each tensor, makes the allocator poll events
to find out when memory is free, and the peak is then no longer determined by the schedule. Kept until the end of a
slot, all layers of a stage would hold the gradients of their Linears at once, and recompute of layers would save
nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from dryvine.comm.pending import Pending
from dryvine.parallel.flow_control import STEPS_HELD
from dryvine.parallel.stage import Grads, StepResult, StreamName
from dryvine.parallel.wgrad import Closure

Run = Callable[[Grads], StepResult]  # a step: of a state in a forward, of gradients in a backward
EventPair = tuple[torch.cuda.Event, torch.cuda.Event]  # the start and the end of an interval on a stream


@dataclass
class Baton:
    """The value that passes from step to step of one op, and what the next step must wait for."""

    value: Pending[Grads]
    stream: StreamName = "compute"  # the stream that made it
    event: torch.cuda.Event | None = None  # when it was made; None for the op's input


class Streams(Protocol):
    """The streams of one run of a schedule, and what was measured on them in that run."""

    def step(self, name: StreamName, baton: Baton, run: Run) -> None:
        """Call `run` on the baton's value in stream `name`, and put the result's value into the baton.

        What the step spent is held as long as another stream may use it. Its weight gradients may run from now on.
        """
        ...

    def later(self, closures: list[Closure]) -> None:
        """Take over one phase's weight gradients of a W, to be run before `synchronise` returns, in the order given.
        Their inputs have been kept since an earlier slot, so running them early saves no memory."""
        ...

    def take(self, baton: Baton) -> Grads:
        """The baton's value, ready to be used in the compute stream."""
        ...

    def synchronise(self) -> None:
        """End a slot: every stream waits until all have completed what was queued, and what was kept is released."""
        ...

    def mark(self) -> None:
        """Record the current time of the compute stream; on a GPU, the time when the device gets here."""
        ...

    def end(self) -> float:
        """End the run: wait for the device. Returns this host's `time.perf_counter`."""
        ...

    def marks(self) -> list[float]:
        """After `end`: the times that `mark` recorded, in seconds of `time.perf_counter`."""
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """What the compute stream is given inside is a wait for a message."""
        ...

    def exposed(self) -> float:
        """After `end`: seconds in which compute waited for a message and nothing else ran."""
        ...


@dataclass
class CpuStreams:
    """Weight gradients run while compute would wait, oldest first. Of those that a slot makes itself, at most `LAG`
    steps' worth are held back, to bound memory; those that W brings were in memory already."""

    waited: float = 0.0  # seconds
    fillers: deque[deque[Closure]] = field(default_factory=deque)  # of one step each
    made: int = 0  # how many of the fillers, counted from the last, this slot has made
    noted: list[float] = field(default_factory=list)

    LAG = 2  # compute steps whose weight gradients may still be waiting: about one layer

    def step(self, name: StreamName, baton: Baton, run: Run) -> None:
        # Not before a comm step: its message would leave late.
        while name == "compute" and self.made > self.LAG:
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
        with self.waiting():
            return baton.value.wait()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def synchronise(self) -> None:
        while self.fillers:
            self._fill()

    def mark(self) -> None:
        self.noted.append(time.perf_counter())

    def end(self) -> float:
        return time.perf_counter()

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


class OneStream:
    """Everything on the caller's stream, in the order of the calls: what a CUDA graph records. Measures nothing."""

    def step(self, name: StreamName, baton: Baton, run: Run) -> None:
        result = run(self.take(baton))
        baton.value = Pending.done(result.value.wait())
        self.later(result.closures)

    def later(self, closures: list[Closure]) -> None:
        for closure in closures:
            closure()

    def take(self, baton: Baton) -> Grads:
        return baton.value.wait()

    def synchronise(self) -> None: ...

    def mark(self) -> None: ...

    def end(self) -> float:
        return time.perf_counter()

    def marks(self) -> list[float]:
        return []

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def exposed(self) -> float:
        return 0.0


class _Reads(NamedTuple):
    """What the steps up to a compute step read, and the places of the streams that this is held for."""

    held: list[object]
    places: list[torch.cuda.Event]


class CudaStreams:
    """Three streams. What a step read is held for STEPS_HELD compute steps more, whichever stream made it.

    Then all streams wait for where the others were at the end of the step, so whichever is given the memory comes after
    its last reader. They were given that work some steps ago and seldom wait for long: the few steps are what weight
    gradients may lie behind.

    Weight gradients that W brings are dealt out, one phase's for each message that compute waits for, from the moment
    when it starts to wait. All at once they would share the device with compute that is not waiting, and would have
    ended when it does wait.

    `waits` are intervals of the compute stream in which it waits, `fills` those of the weight gradients' stream in
    which it works. Time is exposed where a wait lies outside all fills. Each comm step counts as a wait of compute too:
    in a routing the host waits for counts, and only the device knows whether compute had work left meanwhile.
    """

    def __init__(self, device: torch.device, side: SideStreams) -> None:
        self.side = side
        self.compute = torch.cuda.current_stream(device)
        self.held: list[object] = []  # since the last compute step
        self.reads: deque[_Reads] = deque()  # of the compute steps before, oldest first
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
            # A wait of the stream, not of the host.
            made = result.value.wait()
        baton.value, baton.stream, baton.event = Pending.done(made), name, stream.record_event()
        if result.closures:
            self._fill(result.closures)
        if name == "compute":
            self._let_go()

    def _let_go(self) -> None:
        """A compute step has ended: release what was read STEPS_HELD of them ago."""
        every = (self.compute, self.side.comm, self.side.wgrad)
        self.reads.append(_Reads(self.held, [stream.record_event() for stream in every]))
        self.held = []
        if len(self.reads) <= STEPS_HELD:
            return
        for stream in every:
            for place in self.reads[0].places:
                stream.wait_event(place)
        self.reads.popleft()

    def later(self, closures: list[Closure]) -> None:
        self.dealt.append(closures)

    def _fill(self, closures: list[Closure]) -> None:
        """Run weight gradients in their stream, after all that compute has been given so far."""
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

    def synchronise(self) -> None:
        while self.dealt:
            self._fill(self.dealt.popleft())
        with self._timed(self.waits, self.compute):
            self.compute.wait_stream(self.side.comm)
        self.compute.wait_stream(self.side.wgrad)
        # Only after compute has waited for both: what is released below may be comm's memory that wgrad still reads.
        self.side.comm.wait_stream(self.compute)
        self.side.wgrad.wait_stream(self.compute)
        self.held.clear()
        self.reads.clear()

    def mark(self) -> None:
        self.noted.append(_record(self.compute))

    def end(self) -> float:
        # Events give distances only: measure from one whose time the host knows, as it has just waited for it.
        self.last = _record(self.compute)
        self.last.synchronize()
        self.ended = time.perf_counter()
        return self.ended

    def marks(self) -> list[float]:
        return [self.ended - mark.elapsed_time(self.last) / 1e3 for mark in self.noted]

    def waiting(self) -> AbstractContextManager[None]:
        return self._timed(self.waits, self.compute)

    def exposed(self) -> float:
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
        """Make `stream` wait for the step that made the baton's value, if that was in the other stream."""
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
    """How much time of `waits` lies outside `covers`. Both are intervals (start, end), disjoint and in order."""
    total, n = 0.0, 0
    for start, end in waits:
        total += end - start
        while n < len(covers) and covers[n][0] < end:
            total -= max(0.0, min(end, covers[n][1]) - max(start, covers[n][0]))
            n += 1
        # The last cover may reach into the next wait.
        n = max(n - 1, 0)
    return total


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


@dataclass(frozen=True)
class SideStreams:
    """The two streams beside compute. Communication has the higher priority: others wait for its messages."""

    comm: torch.cuda.Stream
    wgrad: torch.cuda.Stream


def make_streams(device: torch.device) -> Callable[[], Streams]:
    """A function that returns the `Streams` of a new run on `device`. CUDA streams are created once and reused."""
    if device.type == "cpu":
        return CpuStreams
    side = SideStreams(torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device))
    return lambda: CudaStreams(device, side)
