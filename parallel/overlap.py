"""The order inside a pair: two microbatches' phases woven so that one's communication runs under the other's compute.

A track is an op cut into units (one per layer) of named steps. A comm step starts its all-to-all and comes back; the
next step of the same track waits for it. So the order in which steps are called is the overlap, and `ORDER` below is
all there is to decide. DeepSeek-V3 (arXiv 2412.19437, figure 4) gives the order of an F&B pair: combine(B) runs under
attention(F), dispatch(F) under experts(B), dispatch(B) under experts(W) and experts(F), combine(F) under attention(B)
and attention(W). Whatever the order, each track runs the same steps on the same data: the bits do not change.

Steps of a unit are named by phase and part: `experts`, and `experts.W` for the weight gradients that the backward of
experts left. Phases without a row of their own (embed, dense, head, ...) take attention's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

from dryvine.comm.api import Pending
from dryvine.parallel.stage import Clock, Flight, Grads, Phase, Stage, State
from dryvine.parallel.wgrad import Closure

# (track, step): the first track of a pair is 0. F is listed first in an F&B pair.
Order = tuple[tuple[int, str], ...]

FB: Order = (
    (1, "combine"),
    (0, "attention"),
    (0, "dispatch"),
    (1, "experts"),
    (1, "dispatch"),
    (1, "experts.W"),
    (0, "experts"),
    (0, "combine"),
    (1, "attention"),
    (1, "attention.W"),
)
FF: Order = (
    (0, "attention"),
    (0, "dispatch"),
    (1, "attention"),
    (1, "dispatch"),
    (0, "experts"),
    (0, "combine"),
    (1, "experts"),
    (1, "combine"),
)
BB: Order = (
    (0, "combine"),
    (1, "combine"),
    (0, "experts"),
    (0, "dispatch"),
    (0, "experts.W"),
    (1, "experts"),
    (1, "dispatch"),
    (1, "experts.W"),
    (0, "attention"),
    (0, "attention.W"),
    (1, "attention"),
    (1, "attention.W"),
)
# W has no communication of its own: it fills the waits of its partner.
FW: Order = (
    (0, "attention"),
    (0, "dispatch"),
    (1, "experts.W"),
    (0, "experts"),
    (0, "combine"),
    (1, "attention.W"),
)
BW: Order = (
    (0, "combine"),
    (1, "experts.W"),
    (0, "experts"),
    (0, "dispatch"),
    (0, "experts.W"),
    (1, "attention.W"),
    (0, "attention"),
    (0, "attention.W"),
)
WW: Order = ((0, "experts.W"), (0, "attention.W"), (1, "experts.W"), (1, "attention.W"))

# I is a B whose W steps are left for later: the rows that it lacks are passed over.
ORDER: dict[str, Order] = {"FB": FB, "FF": FF, "BB": BB, "FW": FW, "BW": BW, "WW": WW}
LONE: dict[str, tuple[str, ...]] = {
    "F": ("attention", "dispatch", "experts", "combine"),
    "B": ("combine", "experts", "dispatch", "experts.W", "attention", "attention.W"),
}


class Step(NamedTuple):
    name: str  # attention | dispatch | experts | combine, or with .W
    run: Callable[[], None]


@dataclass
class Track:
    """An op of one microbatch as units of steps, and the value that goes from step to step."""

    kind: str  # F, B (I too) or W
    clock: Clock
    value: Pending = field(default_factory=lambda: Pending.done(()))
    waiting: bool = False  # the value is a communication under way
    units: list[list[Step]] = field(default_factory=list)

    def take(self) -> State:
        """The value, waited for; time spent waiting for communication is the clock's."""
        return self.clock.wait(self.value) if self.waiting else self.value.wait()

    def put(self, value: Pending, phase: Phase) -> None:
        self.value, self.waiting = value, phase.lane == "comm"


def forward(stage: Stage, flight: Flight, state: State, clock: Clock) -> Track:
    """F of one microbatch. The track's last value is the state for the next stage."""
    track = Track("F", clock, Pending.done(state))

    def step(index: int, phase: Phase) -> Step:
        return Step(_row(phase), lambda: track.put(phase.forward(index, track.take(), flight), phase))

    track.units = [[step(i, p) for i, p in unit] for unit in _units(stage)]
    return track


def backward(stage: Stage, flight: Flight, grads: Grads, clock: Clock, split: bool) -> Track:
    """B of one microbatch, or I when `split`: then the weight gradients stay in `flight.wgrads`."""
    track = Track("B", clock, Pending.done(grads))

    def steps(index: int, phase: Phase) -> Iterator[Step]:
        closures: list[Closure] = []
        yield Step(_row(phase), lambda: track.put(phase.backward(index, track.take(), flight, closures), phase))
        if phase.lane == "comm":
            return
        name = _row(phase) + ".W"
        if split:
            flight.wgrads.append((name, closures))
        else:
            yield Step(name, lambda: run_closures(closures))

    track.units = [[s for i, p in reversed(unit) for s in steps(i, p)] for unit in reversed(_units(stage))]
    return track


def weights(flight: Flight, clock: Clock) -> Track:
    """W of one microbatch: what its I left, in the order in which I made it."""
    left, flight.wgrads = flight.wgrads, []
    return Track("W", clock, units=[[Step(name, partial(run_closures, closures))] for name, closures in left])


def run_closures(closures: list[Closure]) -> None:
    """Run and drop each, so that what it held is freed as it goes."""
    for closure in closures:
        closure()
    closures.clear()


def lone(track: Track) -> Iterator[Step]:
    """The steps of an op that runs alone: B's expert weight gradients come under its dispatch."""
    order = LONE.get(track.kind)
    for unit in track.units:
        yield from sorted(unit, key=lambda s: order.index(s.name)) if order else unit


def woven(first: Track, second: Track) -> Iterator[Step]:
    """The steps of a pair in the order of its table, unit by unit; the longer track ends alone."""
    if first.kind + second.kind not in ORDER:
        first, second = second, first
    rank = {step: i for i, step in enumerate(ORDER[first.kind + second.kind])}
    for units in zip_longest(first.units, second.units, fillvalue=[]):
        yield from [s for _, s in sorted(((rank[t, s.name], s) for t, unit in enumerate(units) for s in unit), key=_at)]


def _at(item: tuple[int, Step]) -> int:
    return item[0]


def _units(stage: Stage) -> list[list[tuple[int, Phase]]]:
    """Cut a stage where the layer changes, or where a phase's row comes before the last one's (MTP's own head)."""
    units: list[list[tuple[int, Phase]]] = []
    place = LONE["F"].index
    for index, phase in enumerate(stage.phases):
        last = units[-1][-1][1] if units else None
        if last is None or last.layer != phase.layer or place(_row(phase)) < place(_row(last)):
            units.append([])
        units[-1].append((index, phase))
    return units


def _row(phase: Phase) -> str:
    return phase.name if phase.name in ("dispatch", "experts", "combine") else "attention"


def play(tracks: Sequence[Track], overlap: bool) -> None:
    """Run one op, or a pair: woven, or one after the other (the same bits, for comparison and debugging)."""
    if len(tracks) == 2 and overlap:
        steps: Iterator[Step] = woven(*tracks)
    else:
        steps = (step for track in tracks for step in lone(track))
    for step in steps:
        step.run()
