"""A stage's ops as CUDA graphs: an op is recorded at its first use and from then on replayed with one launch.

A stage of a V3-like model launches a thousand kernels a microbatch, which takes a host longer than the GPU takes to run
them. A graph contains the addresses of one microbatch's tensors, so there is one for each op (F, B, I, W) of each
microbatch in flight at once: a schedule that holds three microbatches in a stage has three flights there, whose graphs
later microbatches reuse in turn. Varying inputs are copied in before a replay (tokens, loss scale, received tensors,
documents, which are filled up to lengths that no microbatch has exceeded yet), and the stage's outputs are copied out
after it, so that a message or the next stage may keep them for any time: 2/3 of a millisecond for each GB.

All graphs of a rank run one after the other on one stream. Those of one flight share a memory pool: tensors that are
used from one of its ops to another are kept permanently, all others are temporaries, whose memory its other ops reuse.
Flights do not share pools: a tensor that one flight keeps may be where an earlier recorded graph of another has a
temporary, and schedules replay flights in any order. (This has happened: losses were right, gradients NaN at the second
replay.) `torch.cuda.make_graphed_callables` supports neither W nor flights; torch.compile cannot trace closures that
add to gradients.

Within a graph nothing overlaps, and no graph contains communication. An op whose dispatcher sends is several graphs,
with its messages' live steps between them (`comm/live_steps.py`); a pair's ops take turns, each until it must wait for
a message, so that one's copies run under the other's compute.
"""

from __future__ import annotations

import gc
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.live_steps import LiveStep, LiveSteps
from dryvine.comm.topology import LinkClass
from dryvine.parallel import overlap
from dryvine.parallel.schedule.ir import Op
from dryvine.parallel.stage import Flight, Phase, Stage, State
from dryvine.parallel.streams import OneStream
from dryvine.parallel.wgrad import Closure

T = TypeVar("T")
Pool = torch.cuda._POOL_HANDLE  # its number


class Recorder(Protocol):
    """Records what a function launches on a device, without running it."""

    live: LiveSteps  # of the messages in what is recorded

    def pool(self) -> Pool:
        """A memory pool for graphs that may share memory."""
        ...

    def record(self, run: Callable[[], T], pool: Pool) -> tuple[list[LiveStep], T]:
        """Record `run()`. Returns what replays it: graphs and live steps, in order; and its result, whose tensors have
        memory but, until a replay, no values."""
        ...

    def free(self) -> None:
        """Return unused memory, and that of deleted graphs, to the device, once it is idle."""
        ...


class CudaRecorder:
    def __init__(self, device: torch.device, live: LiveSteps) -> None:
        # Autograd runs a node of the backward on the stream of its forward, so all graphs are recorded on one.
        self.stream, self.live = torch.cuda.Stream(device), live

    def pool(self) -> Pool:
        return torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], T], pool: Pool) -> tuple[list[LiveStep], T]:
        parts = _Parts(pool)
        # A collection could destroy a CUDA object, which a stream that records forbids.
        collecting = gc.isenabled()
        gc.disable()
        try:
            # The backward in this thread: the one that records.
            with torch.cuda.stream(self.stream), torch.autograd.set_multithreading_enabled(False):
                made = self._recorded(run, parts)
        finally:
            if collecting:
                gc.enable()
        return parts.steps, made

    def _recorded(self, run: Callable[[], T], parts: _Parts) -> T:
        parts.begin()
        try:
            with self.live.recorded_by(parts.cut):
                made = run()
        except BaseException:
            parts.abandon()
            raise
        parts.end()
        return made

    def free(self) -> None:
        torch.cuda.synchronize(self.stream.device)
        torch.cuda.empty_cache()


class _Parts:
    """The graphs of one recording, and the live steps between them."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.steps = pool, list[LiveStep]()
        self._empty: list[torch.cuda.CUDAGraph] = []  # held: a pool ends with its last graph

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may go on calling CUDA.
        self._graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def end(self) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self._graph.capture_end()
        if any("graph is empty" in str(each.message).lower() for each in said):
            self._empty.append(self._graph)
        else:
            self.steps.append(LiveStep(self._graph.replay))

    def abandon(self) -> None:
        """After an error, which usually makes CUDA refuse to end the recording: that must not be what others hear."""
        with suppress(RuntimeError):
            self._graph.capture_end()

    def cut(self, step: LiveStep) -> None:
        self.end()
        self.steps.append(step)
        self.begin()


@dataclass(frozen=True)
class RecordedOp:
    steps: list[LiveStep]  # graphs too
    inputs: State  # static buffers for the op's input
    outputs: State  # static buffers that hold its result after a replay
    sent: dict[LinkClass, int]  # bytes that the dispatcher counted in graphs


class PlayedOp(NamedTuple):
    op: Op
    stage: Stage
    flight: Flight
    state: State  # that it starts from


@dataclass
class Recordings:
    """The graphs of one flight's ops, and all tensors that are used from one of them to another."""

    flight: Flight
    pool: Pool
    ops: dict[str, RecordedOp] = field(default_factory=dict)
    saved: dict[Phase, object] = field(default_factory=dict)  # by F, for B and for I: a schedule may have both
    closures: list[list[Closure]] = field(default_factory=list)  # of I, for W


class Graphs:
    """All graphs of one rank. `constants` returns the values that the graphs contain as constants; when they change,
    everything is recorded again."""

    def __init__(self, recorder: Recorder, meter: Meter, constants: Callable[[], Hashable]) -> None:
        self.recorder, self.meter, self.constants = recorder, meter, constants
        self._recorded: defaultdict[int, list[Recordings]] = defaultdict(list)  # by stage
        self._idle: defaultdict[int, list[int]] = defaultdict(list)  # recordings that no microbatch uses, by stage
        self._used: dict[tuple[int, int], int] = {}  # (stage, microbatch) -> which
        self._constants: Hashable = None
        self._sizes: tuple[int, ...] = ()  # that the graphs have of what varies in `Carried`
        # The kinds of `Carried` whose first run, without graphs, has loaded every kernel and made what is made once.
        self.loaded: set[Hashable] = set()

    @property
    def count(self) -> int:
        return sum(len(recordings.ops) for stage in self._recorded.values() for recordings in stage)

    def begin(self, kind: Hashable, sizes: Sequence[tuple[int, ...]]) -> None:
        """Start a run of a schedule, whose microbatches carry something of this kind, in these sizes. If that is
        another kind, or larger than all before, or constants have changed, all graphs are recorded anew."""
        now = (kind, self.constants())
        known = [self._sizes] if self._constants == now else []
        largest = tuple(max(column) for column in zip(*known, *sizes, strict=True))
        if self._constants != now or self._sizes != largest or not self._recorded:
            self.drop()
        self._constants, self._sizes = now, largest
        self._used.clear()
        self._idle = defaultdict(list, {n: list(range(len(stage))) for n, stage in self._recorded.items()})

    def drop(self) -> None:
        """Drop every graph and its memory. Waits for the device."""
        self._recorded.clear()
        self.recorder.free()

    def play(self, ops: Sequence[PlayedOp], waiting: Callable[[], AbstractContextManager[None]]) -> list[State]:
        """Run one op or a pair. Returns what each hands on; an F adds its losses to its flight. `waiting` is entered
        around waits for messages."""
        recorded = [self._given(each) for each in ops]
        programs = [
            (f" in {each.op.kind} of stage {each.op.stage}, microbatch {each.op.microbatch}", deque(of.steps))
            for each, of in zip(ops, recorded, strict=True)
        ]
        while any(steps for _, steps in programs):
            for during, steps in programs:
                self.recorder.live.during = during
                _until_it_waits(steps, waiting)
        self.recorder.live.during = ""
        for each, of in zip(ops, recorded, strict=True):
            self.meter.put(of.sent)
            if each.op.kind == "F":
                losses = self._of(each.op).flight.losses
                each.flight.losses.update({name: loss.clone() for name, loss in losses.items()})
            self._release(each.op)
        return [tuple(made.clone() for made in of.outputs) for of in recorded]

    def _given(self, played: PlayedOp) -> RecordedOp:
        """The recording of an op, a new one if there is none, with this microbatch's input."""
        op, stage, flight, state = played
        recordings = self._recordings(op, flight)
        recorded = recordings.ops.get(op.kind) or self._record(op, stage, recordings, state)
        if op.kind == "F":
            own = recordings.flight
            # `data`: a backward may be recorded after this, and asks for the version that its forward saved.
            own.tokens.data.copy_(flight.tokens)
            assert isinstance(own.loss_scale, Tensor)
            own.loss_scale.data.fill_(flight.loss_scale)
            if own.documents and flight.documents:
                given = flight.documents.filled(self._sizes).tensors()
                for memory, value in zip(own.documents.tensors(), given, strict=True):
                    memory.data.copy_(value)
        for memory, value in zip(recorded.inputs, state, strict=True):
            memory.data.copy_(value)
        return recorded

    def _recordings(self, op: Op, flight: Flight) -> Recordings:
        """Those of the op's microbatch: the same from its F until its B or W has been played."""
        stage, idle = self._recorded[op.stage], self._idle[op.stage]
        if op.kind == "F":
            if not idle:
                idle.append(len(stage))
                tokens = flight.tokens.clone()
                scale = torch.ones((), dtype=torch.float32, device=tokens.device)
                documents = flight.documents and flight.documents.filled(self._sizes).copied()
                own = Flight(tokens, scale, documents=documents, recorded=True)
                stage.append(Recordings(own, self.recorder.pool()))
            self._used[op.stage, op.microbatch] = idle.pop()
        return self._of(op)

    def _release(self, op: Op) -> None:
        """After its last op a microbatch's recordings are free for another."""
        if op.kind in "BW":
            self._idle[op.stage].append(self._used.pop((op.stage, op.microbatch)))

    def _of(self, op: Op) -> Recordings:
        return self._recorded[op.stage][self._used[op.stage, op.microbatch]]

    def _record(self, op: Op, stage: Stage, recordings: Recordings, state: State) -> RecordedOp:
        flight = recordings.flight
        inputs = tuple(t.clone() for t in state)
        # A backward takes what it reads out of the flight, and so does W.
        flight.saved = dict(recordings.saved)
        before = self.meter.take()
        # Two slots on for a backward, so that the messages of a pair, which take turns, do not wait for each other's.
        self.recorder.live.number = 0 if op.kind == "F" else 2
        steps, (outputs,) = self.recorder.record(
            lambda: overlap.play([overlap.track(op, stage, flight, inputs)], OneStream(), None), recordings.pool
        )
        sent = self.meter.take()
        self.meter.put(before)
        if op.kind == "F":
            recordings.saved = flight.saved
        if op.kind == "I":
            recordings.closures = list(flight.wgrads)
        recordings.ops[op.kind] = made = RecordedOp(steps, inputs, outputs, sent)
        return made


def _until_it_waits(steps: deque[LiveStep], waiting: Callable[[], AbstractContextManager[None]]) -> None:
    """Run the first step, and what follows it up to the next wait."""
    first = True
    while steps and (first or not steps[0].waits):
        step, first = steps.popleft(), False
        with waiting() if step.waits else nullcontext():
            step.run()
