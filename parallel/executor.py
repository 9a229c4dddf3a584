"""Runs a lowered schedule: waits for what a slot needs, runs its ops, sends what they made. No schedule is named here,
and no rule of which op needs which: a program lists the edges that enter and leave each op.

A receive is posted one slot before the slot that needs it and waited for when that slot starts; a send leaves as soon
as its slot has ended, and is held until it is gone. A rank that gets further ahead of its neighbour than the simulated
schedule ever does waits for it: the schedule bounds the messages under way, however late a rank is. Weight gradients
stay in the flight of their microbatch between I and W, so W needs no queue and no order except the schedule's.
`torch.distributed.pipelining`'s runtime allows one rank per stage and runs a pair's F and B one after the other; it is
an oracle for our schedules, not our executor.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

from torch import Tensor

from dryvine.comm.pending import Pending
from dryvine.comm.wire import Wire
from dryvine.parallel import overlap as weave
from dryvine.parallel.flow_control import RankProgram, SendQueue, channel, queue
from dryvine.parallel.graphs import Graphs, PlayedOp
from dryvine.parallel.overlap import PairOrder
from dryvine.parallel.schedule.ir import Edge, Op, ProgramStep, Slot
from dryvine.parallel.stage import Carried, Flight, Stage, State
from dryvine.parallel.streams import Streams


@dataclass(frozen=True)
class Batch:
    """One step's work for a data rank. `tokens[m]` are the sequences of microbatch m, int64 [sequences, T + extra];
    `loss_scale` seeds the backward of every loss. `documents[m]` goes into the flights of microbatch m as it is.
    `eager`: without CUDA graphs, for a step that does more than others."""

    tokens: Sequence[Tensor]
    loss_scale: float
    training: bool = True
    documents: Sequence[Carried] | None = None
    eager: bool = False


class PlayedTimes(NamedTuple):
    """Of one run of the schedule, in seconds of `time.perf_counter`."""

    timeline: Sequence[tuple[Slot, float, float]] = ()  # slot, start, end; it starts when what it needs has arrived
    exposed: float = 0.0  # seconds in which compute waited for the all-to-all inside ops


@dataclass
class Played:
    """What a rank did in one run of the schedule. A GPU's times are those of hundreds of events, and reading them takes
    milliseconds, so they are read when they are asked for: by then the GPU has the update to do."""

    losses: dict[str, list[Tensor]] = field(default_factory=dict)  # name -> one scalar per microbatch that made it
    microbatches: dict[str, list[int]] = field(default_factory=dict)  # name -> which ones, in the same order
    started: float = 0.0
    ended: float = 0.0
    read_times: Callable[[], PlayedTimes] = PlayedTimes

    @cached_property
    def times(self) -> PlayedTimes:
        return self.read_times()

    @property
    def timeline(self) -> Sequence[tuple[Slot, float, float]]:
        return self.times.timeline

    @property
    def exposed(self) -> float:
        return self.times.exposed

    @property
    def idle(self) -> float:
        """Seconds in which this rank ran no op: the measured bubble."""
        return self.ended - self.started - sum(end - start for _, start, end in self.timeline)


@dataclass(frozen=True)
class EdgeWire:
    """A wire that is addressed by edges. `shape` returns meta tensors like those that cross an edge; it is asked each
    time that one is received, so shapes may differ from step to step."""

    wire: Wire
    shape: Callable[[Edge], State]

    def receive(self, edge: Edge) -> Pending[State]:
        return self.wire.receive(self.shape(edge), edge.source, channel(edge), _label(edge))

    def send(self, edge: Edge, state: State) -> Pending[None]:
        return self.wire.send(state, edge.target, channel(edge), _label(edge))


class LayerHooks(Protocol):
    """Called as a schedule runs, once per layer, in the stream where it happens: for work on weights beside the
    schedule."""

    def begin(self) -> None:
        """A run of the schedule begins."""
        ...

    def need(self, layer: str) -> None:
        """The layer is about to read its weights."""
        ...

    def summed(self, layer: str) -> None:
        """The layer's last gradient of the run has been added."""
        ...


class NoHooks:
    """Does nothing."""

    def begin(self) -> None:
        pass

    def need(self, layer: str) -> None:
        pass

    def summed(self, layer: str) -> None:
        pass


NO_HOOKS = NoHooks()


def _label(edge: Edge) -> str:
    return f"stage {edge.stage}, microbatch {edge.microbatch}"


class Executor:
    """One rank's part of a schedule, ready to run any number of times.

    `stages` maps the numbers of this rank's stages to them; `order` weaves pairs (`overlap.ORDERS`), and None plays a
    pair's ops one by one, for the same bits, as do `graphs`, by which ops are replayed where a batch allows it.
    """

    def __init__(
        self,
        program: RankProgram,
        stages: dict[int, Stage],
        wire: EdgeWire,
        streams: Callable[[], Streams],
        order: dict[str, PairOrder] | None,
        hooks: LayerHooks = NO_HOOKS,
        graphs: Graphs | None = None,
    ) -> None:
        self.program, self.stages, self.wire, self.streams, self.order = program, stages, wire, streams, order
        self.hooks, self._last, self.graphs = hooks, last_gradients(program), graphs

    def run(self, batch: Batch) -> Played:
        """Play every slot once. The gradients are in the parameters' `main_grad` when it returns."""
        play = _Play(batch, self.streams(), self._graphs(batch))
        self.hooks.begin()
        for step, posts in zip(self.program.steps, self.program.posts, strict=True):
            for edge in posts:
                play.arrivals[edge] = self.wire.receive(edge)
            self._step(step, play)
        for leaving in play.leaving.values():
            _let_go(leaving, 0)
        return play.end()

    def _graphs(self, batch: Batch) -> Graphs | None:
        """The graphs that replay this batch's ops; None if the host calls their phases one by one."""
        if self.graphs is None or not batch.training:
            return None
        documents = batch.documents or ()
        kind = documents[0].kind if documents else None
        if batch.eager or kind not in self.graphs.loaded:
            # Graphs and eager ops together would need the activations twice.
            self.graphs.drop()
            self.graphs.loaded.add(kind)
            return None
        self.graphs.begin(kind, [each.sizes() for each in documents])
        return self.graphs

    def _step(self, step: ProgramStep, play: _Play) -> None:
        """Run a slot, then hand what its ops made to other ranks or to a stage of this one."""
        results = self._slot(step, play)
        for edge, state in zip(step.outputs, results, strict=True):
            if edge is None:
                continue
            if edge.is_message:
                self._send(edge, state, play)
            else:
                play.arrivals[edge] = Pending.done(state)

    def _slot(self, step: ProgramStep, play: _Play) -> list[State]:
        """Run the slot's ops. Returns what each of them hands on."""
        inputs = [play.arrivals.pop(edge).wait() if edge else () for edge in step.inputs]
        play.streams.mark()
        ops = [
            PlayedOp(op, self.stages[op.stage], play.flight(op), state)
            for op, state in zip(step.slot, inputs, strict=True)
        ]
        if play.graphs is None:
            results = weave.play([self._track(*op) for op in ops], play.streams, self.order)
        else:
            results = self._replay(play.graphs, ops, play.streams)
        for op in step.slot:
            play.land(op)
        play.streams.mark()
        play.slots.append(step.slot)
        return results

    def _track(self, op: Op, stage: Stage, flight: Flight, state: State) -> weave.Track:
        summed = self.hooks.summed if (op.stage, op.microbatch) in self._last else None
        return weave.track(op, stage, flight, state, self.hooks.need, summed)

    def _replay(self, graphs: Graphs, ops: Sequence[PlayedOp], streams: Streams) -> list[State]:
        """Replay a slot's ops. Hooks cannot run inside a graph: all layers' are called before or after."""
        for op, stage, _, _ in ops:
            if op.kind == "F":
                for layer in _layers(stage):
                    self.hooks.need(layer)
        made = graphs.play(ops, streams.waiting)
        for op, stage, _, _ in ops:
            if op.kind in "BW" and (op.stage, op.microbatch) in self._last:
                for layer in _layers(stage):
                    self.hooks.summed(layer)
        return made

    def _send(self, edge: Edge, state: State, play: _Play) -> None:
        leaving = play.leaving[queue(edge)]
        leaving.append(self.wire.send(edge, state))
        _let_go(leaving, self.program.limits[queue(edge)])


def _layers(stage: Stage) -> dict[str, None]:
    """Their names, in order."""
    return dict.fromkeys(phase.layer for phase in stage.phases)


def last_gradients(program: RankProgram) -> frozenset[tuple[int, int]]:
    """(stage, microbatch) of the ops that add the last gradients to each of a rank's stages. A stage with two ops in
    its last slot is left out, since either may end last."""
    ops: dict[int, list[Op]] = {}
    for step in program.steps:
        in_slot: defaultdict[int, list[Op]] = defaultdict(list)
        for op in step.slot:
            if op.kind in "BW":
                in_slot[op.stage].append(op)
        ops |= in_slot
    return frozenset((stage, last[0].microbatch) for stage, last in ops.items() if len(last) == 1)


class _Play:
    """One run under way: its microbatches in flight, what has arrived for them, and what was measured.

    A flight is made by F and dropped by B or W (by F itself when not training).
    """

    def __init__(self, batch: Batch, streams: Streams, graphs: Graphs | None) -> None:
        self.batch, self.streams, self.graphs = batch, streams, graphs
        self.arrivals: dict[Edge, Pending[State]] = {}
        self.leaving: defaultdict[SendQueue, deque[Pending[None]]] = defaultdict(deque)
        self.slots: list[Slot] = []
        self.played = Played(started=time.perf_counter())
        self._flights: dict[tuple[int, int], Flight] = {}

    def flight(self, op: Op) -> Flight:
        """The op's flight, a new one for F."""
        key = (op.stage, op.microbatch)
        if op.kind == "F":
            batch, m = self.batch, op.microbatch
            self._flights[key] = Flight(
                batch.tokens[m],
                batch.loss_scale,
                batch.training,
                m,
                documents=batch.documents[m] if batch.documents else None,
            )
        return self._flights[key]

    def land(self, op: Op) -> None:
        """After the op: record its losses, and drop the flight if this was its last op."""
        key = (op.stage, op.microbatch)
        if op.kind == "F":
            for name, loss in self._flights[key].losses.items():
                self.played.losses.setdefault(name, []).append(loss)
                self.played.microbatches.setdefault(name, []).append(op.microbatch)
        if op.kind in "BW" or not self.batch.training:
            del self._flights[key]

    def end(self) -> Played:
        self.played.ended = self.streams.end()
        slots, streams = self.slots, self.streams

        def read() -> PlayedTimes:
            seconds = streams.marks()  # of each slot's start and end
            return PlayedTimes(list(zip(slots, seconds[::2], seconds[1::2], strict=True)), streams.exposed())

        self.played.read_times = read
        return self.played


def _let_go(leaving: deque[Pending[None]], limit: int) -> None:
    """Drop the sends that have completed, and wait for the oldest while there are more than `limit`."""
    while leaving and (len(leaving) > limit or leaving[0].ready()):
        leaving.popleft().wait()
