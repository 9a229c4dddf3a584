"""A stage's ops as CUDA graphs: an op is recorded at its first use and from then on replayed with one launch.

A stage of a V3-like model launches a thousand kernels a microbatch, which takes a host longer than the GPU takes to run
them. A graph contains the addresses of one microbatch's tensors, so there is one for each op (F, B, I, W) of each
microbatch in flight at once: a schedule that holds three microbatches in a stage has three flights there, whose graphs
later microbatches reuse in turn. Varying inputs are copied in before a replay (tokens, loss scale, received tensors),
and the stage's outputs are copied out after it, so that a message or the next stage may keep them for any time: 2/3 of
a millisecond for each GB.

All graphs of a rank run one after the other on one stream. Those of one flight share a memory pool: tensors that are
used from one of its ops to another are kept permanently, all others are temporaries, whose memory its other ops reuse.
Flights do not share pools: a tensor that one flight keeps may be where an earlier recorded graph of another has a
temporary, and schedules replay flights in any order. (This has happened: losses were right, gradients NaN at the second
replay.) `torch.cuda.make_graphed_callables` supports neither W nor flights; torch.compile cannot trace closures that
add to gradients.

Within a graph nothing overlaps, so this is for ops without communication: for one expert-parallel rank.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.topology import LinkClass
from dryvine.parallel import overlap
from dryvine.parallel.schedule.ir import Op
from dryvine.parallel.stage import Flight, Phase, Stage, State
from dryvine.parallel.streams import OneStream
from dryvine.parallel.wgrad import Closure

T = TypeVar("T")
Pool = torch.cuda._POOL_HANDLE  # its number


class Graph(Protocol):
    """The kernels that were launched during one recording."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Records what a function launches on a device, without running it."""

    def pool(self) -> Pool:
        """A memory pool for graphs that may share memory."""
        ...

    def record(self, run: Callable[[], T], pool: Pool) -> tuple[Graph, T]:
        """Record `run()`. Its tensors have memory but, until a replay, no values."""
        ...

    def free(self) -> None:
        """Return unused memory, and that of deleted graphs, to the device, which must be idle."""
        ...


class CudaRecorder:
    def __init__(self, device: torch.device) -> None:
        # Autograd runs a node of the backward on the stream of its forward, so all graphs are recorded on one.
        self.stream = torch.cuda.Stream(device)

    def pool(self) -> Pool:
        return torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], T], pool: Pool) -> tuple[Graph, T]:
        graph = torch.cuda.CUDAGraph()
        # A collection could destroy a CUDA object, which a stream that records forbids.
        collecting = gc.isenabled()
        gc.disable()
        # The backward in this thread: the one that records. Other threads (NCCL's watchdog) may go on calling CUDA.
        with torch.cuda.stream(self.stream), torch.autograd.set_multithreading_enabled(False):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                made = run()
            finally:
                graph.capture_end()
        if collecting:
            gc.enable()
        return graph, made

    def free(self) -> None:
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class RecordedOp:
    graph: Graph
    inputs: State  # static buffers for the op's input
    outputs: State  # static buffers that hold its result after a replay
    sent: dict[LinkClass, int]  # bytes that the dispatcher counted


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
        self.loaded = False  # a run without graphs has loaded every kernel and made whatever is made once

    @property
    def count(self) -> int:
        return sum(len(recordings.ops) for stage in self._recorded.values() for recordings in stage)

    def begin(self) -> None:
        """Start a run of a schedule. If it is the first, or constants have changed, the device must be idle."""
        now = self.constants()
        if self._constants != now or not self._recorded:
            self.drop()
        self._constants = now
        self._used.clear()
        self._idle = defaultdict(list, {n: list(range(len(stage))) for n, stage in self._recorded.items()})

    def drop(self) -> None:
        """Drop every graph and its memory. The device must be idle."""
        self._recorded.clear()
        self.recorder.free()

    def play(self, op: Op, stage: Stage, flight: Flight, state: State) -> State:
        """Run an op of the microbatch that `flight` describes. Returns its outputs; F adds its losses to `flight`."""
        recordings = self._recordings(op, flight)
        recorded = recordings.ops.get(op.kind) or self._record(op, stage, recordings, state)
        if op.kind == "F":
            own = recordings.flight
            # `data`: a backward may be recorded after this, and asks for the version that its forward saved.
            own.tokens.data.copy_(flight.tokens)
            assert isinstance(own.loss_scale, Tensor)
            own.loss_scale.data.fill_(flight.loss_scale)
        for memory, given in zip(recorded.inputs, state, strict=True):
            memory.data.copy_(given)
        recorded.graph.replay()
        self.meter.put(recorded.sent)
        if op.kind == "F":
            flight.losses.update({name: loss.clone() for name, loss in recordings.flight.losses.items()})
        return tuple(made.clone() for made in recorded.outputs)

    def _recordings(self, op: Op, flight: Flight) -> Recordings:
        """The recordings that the op's microbatch uses: the same from its F to its B or W, then free for another."""
        stage, key, idle = self._recorded[op.stage], (op.stage, op.microbatch), self._idle[op.stage]
        if op.kind == "F":
            if not idle:
                idle.append(len(stage))
                tokens = flight.tokens.clone()
                scale = torch.ones((), dtype=torch.float32, device=tokens.device)
                stage.append(Recordings(Flight(tokens, scale, recorded=True), self.recorder.pool()))
            self._used[key] = idle.pop()
        number = self._used[key]
        if op.kind in "BW":
            del self._used[key]
            idle.append(number)
        return stage[number]

    def _record(self, op: Op, stage: Stage, recordings: Recordings, state: State) -> RecordedOp:
        flight = recordings.flight
        inputs = tuple(t.clone() for t in state)
        # A backward takes what it reads out of the flight, and so does W.
        flight.saved = dict(recordings.saved)
        before = self.meter.take()
        graph, (outputs,) = self.recorder.record(
            lambda: overlap.play([overlap.track(op, stage, flight, inputs)], OneStream(), None), recordings.pool
        )
        sent = self.meter.take()
        self.meter.put(before)
        if op.kind == "F":
            recordings.saved = flight.saved
        if op.kind == "I":
            recordings.closures = list(flight.wgrads)
        recordings.ops[op.kind] = made = RecordedOp(graph, inputs, outputs, sent)
        return made
