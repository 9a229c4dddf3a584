"""The order inside a pair: two microbatches' phases woven so that one's communication runs under the other's compute.

An op is a track: units (one per layer) of named steps. A comm step starts its all-to-all and returns; the next step of
its track waits for it. So the order in which steps are called determines the overlap, and the tables below determine
that order. For F&B it is DeepSeek-V3's (arXiv 2412.19437, figure 4): combine(B) runs under attention(F), dispatch(F)
under experts(B), dispatch(B) under experts(W) and experts(F), combine(F) under attention(B) and attention(W). Weight
gradients have no row: `Streams` runs them where compute would wait. Whatever the order, each track runs the same steps
on the same data, and each weight sums its gradients in the same order: the bits do not change.

A scheduler that picks whatever step is ready would need no tables; but then the order would depend on timing, differ
between ranks, and deadlock on collectives. Phases without a row of their own (embed, dense, head) take attention's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, cast

from dryvine.comm.pending import Pending
from dryvine.parallel.schedule.ir import Op
from dryvine.parallel.stage import Flight, Grads, Phase, Stage, State, StepResult, StreamName
from dryvine.parallel.streams import Baton, Run, Streams
from dryvine.parallel.wgrad import Closure

FORWARD = ("attention", "routing", "dispatch", "experts", "combine")
ROUND = 2 * len(FORWARD)  # places in the round of a unit

Told = Callable[[str], None]  # of a layer, by name
TrackPhase = tuple[int, str]  # 0 or 1, and the row's name
PairOrder = dict[TrackPhase, int]  # its place in the round of its unit, of ROUND places


def _round(*rows: TrackPhase, early: str = "") -> PairOrder:
    """Rows in order. A phase that is `early` is the next unit's, and so starts a round before its own."""
    return {row: place - (ROUND if row[1] == early else 0) for place, row in enumerate(rows)}


def _both(*pieces: Sequence[str], early: str = "") -> PairOrder:
    """Two tracks that go the same way, in turn, piece by piece."""
    return _round(*((track, phase) for piece in pieces for track in (0, 1) for phase in piece), early=early)


# Track 0 is F, track 1 is B; the tables differ in when routing(F) stands. On a GPU a step returns before it has run, so
# the host queues experts(B) before it waits for counts in routing(F). On a CPU the host itself computes, so dispatch(F)
# must have left before experts(B), and weight gradients run while counts travel.
FB_HOST = _round(
    (1, "combine"),
    (0, "attention"),
    (0, "routing"),
    (0, "dispatch"),
    (1, "experts"),
    (1, "dispatch"),
    (0, "experts"),
    (0, "combine"),
    (1, "attention"),
)
FB_DEVICE = _round(
    (1, "combine"),
    (0, "attention"),
    (1, "experts"),
    (0, "routing"),
    (0, "dispatch"),
    (1, "dispatch"),
    (0, "experts"),
    (0, "combine"),
    (1, "attention"),
)
FF_HOST = _both(("attention", "routing", "dispatch"), ("experts", "combine"))
FF_DEVICE = _both(("attention",), ("routing", "dispatch"), ("experts", "combine"))
BB = _both(("experts", "dispatch"), ("attention", "combine"), early="combine")
ORDERS: dict[str, dict[str, PairOrder]] = {
    "cpu": {"FB": FB_HOST, "FF": FF_HOST, "BB": BB},
    "cuda": {"FB": FB_DEVICE, "FF": FF_DEVICE, "BB": BB},
}


class Step(NamedTuple):
    """A phase's forward or backward, bound to its flight."""

    phase: str  # a row: attention | routing | dispatch | experts | combine
    stream: StreamName
    run: Run


@dataclass
class Track:
    """An op of one microbatch: units of steps, and the baton that they pass on. `play` uses it up."""

    kind: str  # F, B (I too), or W, which has no steps
    baton: Baton
    units: list[list[Step]] = field(default_factory=list)
    closures: deque[list[Closure]] = field(default_factory=deque)  # W's


def track(
    op: Op, stage: Stage, flight: Flight, state: State, need: Told | None = None, summed: Told | None = None
) -> Track:
    """An op of a schedule, on its microbatch's flight and the state that it starts from."""
    match op.kind:
        case "F":
            return forward(stage, flight, state, need)
        case "B" | "I":
            return backward(stage, flight, state, op.kind == "I", summed)
        case "W":
            return weights(flight)


def forward(stage: Stage, flight: Flight, state: State, need: Told | None = None) -> Track:
    """F of one microbatch. Its baton ends with the state for the next stage. `need` is told of each layer before it
    reads its weights."""
    firsts = _first_phases(stage)

    def step(phase: Phase) -> Step:
        def run(state: Grads) -> StepResult:
            if need and phase is firsts[phase.layer]:
                need(phase.layer)
            return StepResult(phase.forward(cast(State, state), flight), [])

        return Step(_row(phase), phase.stream, run)

    return Track("F", Baton(Pending.done(state)), [[step(phase) for phase in unit] for unit in _units(stage)])


def backward(stage: Stage, flight: Flight, grads: Grads, split: bool, summed: Told | None = None) -> Track:
    """B of one microbatch, or I when `split`: then the weight gradients stay in `flight.wgrads`. `summed`, given if no
    later op adds to the stage's gradients, is told of each layer as one more weight gradient after its last."""
    firsts = _first_phases(stage)

    def step(phase: Phase) -> Step:
        def run(grads: Grads) -> StepResult:
            result = phase.backward(grads, flight)
            if summed and phase is firsts[phase.layer]:
                result.closures.append(partial(summed, phase.layer))
            if not (split and result.closures):
                return result
            flight.wgrads.append(result.closures)
            return result._replace(closures=[])

        return Step(_row(phase), phase.stream, run)

    # Routing has nothing to do backward, and in a stream even an empty step waits for all that was queued before it.
    units = [[step(phase) for phase in reversed(unit) if phase.name != "routing"] for unit in reversed(_units(stage))]
    return Track("B", Baton(Pending.done(grads)), units)


def weights(flight: Flight) -> Track:
    """W of one microbatch: the weight gradients that its I left, in the order in which I made them."""
    left, flight.wgrads = flight.wgrads, deque()
    return Track("W", Baton(Pending.done(())), closures=left)


def play(tracks: Sequence[Track], streams: Streams, order: dict[str, PairOrder] | None) -> list[State]:
    """Run one op, or a pair interleaved by `order`. Without an order a pair's ops run one by one, and each message
    is waited for before the next step. Returns each track's final value."""
    if order is None and len(tracks) > 1:
        return [end for track in tracks for end in play([track], streams, order)]
    for track in tracks:
        while track.closures:
            streams.later(track.closures.popleft())
    for track, step in _woven(tracks, order or {}):
        streams.step(step.stream, track.baton, step.run)
        if order is None:
            # No step runs beside another.
            streams.synchronise()
    # What crosses a stage's border has a gradient, so no place of it is None.
    ends = [cast(State, streams.take(track.baton)) for track in tracks]
    streams.synchronise()
    return ends


def _woven(tracks: Sequence[Track], order: dict[str, PairOrder]) -> Iterable[tuple[Track, Step]]:
    """The steps of both tracks, unit by unit in the order of the pair's table; the rest of the longer track follows."""
    # F first, as in the tables; W has no steps.
    movers = sorted((t for t in tracks if t.kind != "W"), key=lambda t: t.kind == "B")
    place = order[movers[0].kind + movers[1].kind] if len(movers) == 2 else {}
    steps = [
        (ROUND * number + place.get((n, step.phase), 0), track, step)
        for n, track in enumerate(movers)
        for number, unit in enumerate(track.units)
        for step in unit
    ]
    return ((track, step) for _, track, step in sorted(steps, key=lambda item: item[0]))


def _units(stage: Stage) -> list[list[Phase]]:
    """A stage's phases, cut where the layer changes and where a row comes before the last one's (MTP's own head)."""
    units: list[list[Phase]] = []
    for phase in stage.phases:
        last = units[-1][-1] if units else None
        if last is None or last.layer != phase.layer or FORWARD.index(_row(phase)) < FORWARD.index(_row(last)):
            units.append([])
        units[-1].append(phase)
    return units


def _first_phases(stage: Stage) -> dict[str, Phase]:
    """The first phase of each layer, with which its backward ends."""
    return {phase.layer: phase for phase in reversed(stage.phases)}


def _row(phase: Phase) -> str:
    return phase.name if phase.name in FORWARD else "attention"
