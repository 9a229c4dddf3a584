"""What a schedule costs: when each slot runs, how long ranks idle, how many activations they hold.

The same `needs` as the checker and the executor, with a duration per slot. A rank runs its slots in order, each as
soon as the rank is free and what its ops need has ended (and has arrived, if it ended elsewhere). A `Timeline` may
also hold measured times: pictures and figures are the same for both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol

from dryvine.parallel.schedule.costs import Costs
from dryvine.parallel.schedule.footprint import Footprint
from dryvine.parallel.schedule.ir import Op, Schedule, Slot


class Prices(Protocol):
    """What a simulation needs of costs: `Costs`, or prices that differ from stage to stage."""

    @property
    def P2P(self) -> float: ...

    def slot(self, slot: Slot) -> float: ...


class Cell(NamedTuple):
    slot: Slot
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """`cells[p]` are the slots of rank p with their times, in order. Times count from the first start, or near it."""

    schedule: Schedule
    cells: tuple[tuple[Cell, ...], ...]
    label: str = "simulated"

    @property
    def span(self) -> float:
        """From the first start to the last end, over all ranks."""
        times = [t for row in self.cells for cell in row for t in (cell.start, cell.end)]
        return max(times) - min(times)

    def idle(self, rank: int) -> float:
        return self.span - sum(cell.end - cell.start for cell in self.cells[rank])

    @property
    def bubble(self) -> float:
        """The idle time of the rank that idles most."""
        return max(map(self.idle, range(len(self.cells))))

    @property
    def bubble_fraction(self) -> float:
        return self.bubble / self.span

    @property
    def times_by_kind(self) -> dict[str, list[float]]:
        """How long each slot took, by the kinds of its ops in order of the alphabet ("BF": a pair)."""
        times: defaultdict[str, list[float]] = defaultdict(list)
        for cell in chain(*self.cells):
            times["".join(sorted(op.kind for op in cell.slot))].append(cell.end - cell.start)
        return dict(times)

    def held(self, rank: int) -> int:
        """The most microbatch-chunks whose activations the rank holds at once."""
        return Footprint(self.schedule).most_held(rank, dict.fromkeys(range(self.schedule.stages), 1))

    @property
    def peak_activations(self) -> int:
        return max(map(self.held, range(len(self.cells))))

    @property
    def overlapped_share(self) -> float:
        """The part of all forwards that run in a pair."""
        sizes = [len(slot) for slots in self.schedule.ranks for slot in slots for op in slot if op.kind == "F"]
        return sum(size > 1 for size in sizes) / len(sizes)

    @property
    def params_per_rank(self) -> int:
        """Stages whose weights the fullest rank holds."""
        return max(len(self.schedule.stages_of(rank)) for rank in range(len(self.cells)))

    @property
    def figures(self) -> str:
        """All of it in one line, for headlines."""
        bubble = f"bubble {self.bubble:.4g} ({self.bubble_fraction:.1%})"
        memory = f"{self.peak_activations} chunks held, {self.params_per_rank} stages a rank"
        return f"span {self.span:.6g}, {bubble}, {self.overlapped_share:.0%} of forwards overlapped, {memory}"


def measured(schedule: Schedule, times: Sequence[Sequence[tuple[float, float]]]) -> Timeline:
    """The timeline of a real run: per rank, the (start, end) of each slot on one clock, made to count from zero."""
    zero = min(start for row in times for start, _ in row)
    rows = zip(schedule.ranks, times, strict=True)
    cells = tuple(
        tuple(Cell(slot, start - zero, end - zero) for slot, (start, end) in zip(slots, row, strict=True))
        for slots, row in rows
    )
    return Timeline(schedule, cells, "measured")


def simulate(schedule: Schedule, costs: Prices | None = None) -> Timeline:
    """Run a checked schedule without a machine; `costs` are F = I = W = 1 and no pair hides anything if not given."""
    costs = Costs() if costs is None else costs
    ended: dict[Op, float] = {}
    cells: list[list[Cell]] = [[] for _ in schedule.ranks]
    waiting = set(range(len(schedule.ranks)))
    while waiting:
        moved = [cell for rank in sorted(waiting) for cell in _run(schedule, rank, cells[rank], ended, costs)]
        waiting = {rank for rank in waiting if len(cells[rank]) < len(schedule.ranks[rank])}
        if waiting and not moved:
            raise ValueError(f"{schedule.name} stops at a cyclic wait; check() tells where")
    return Timeline(schedule, tuple(map(tuple, cells)))


def _run(schedule: Schedule, rank: int, done: list[Cell], ended: dict[Op, float], costs: Prices) -> Iterator[Cell]:
    """Append to `done` every slot of the rank that can run by now."""
    for slot in schedule.ranks[rank][len(done) :]:
        ready = _ready(schedule, rank, slot, ended, costs.P2P)
        if ready is None:
            return
        start = max(ready, done[-1].end if done else 0.0)
        cell = Cell(slot, start, start + costs.slot(slot))
        ended.update(dict.fromkeys(slot, cell.end))
        done.append(cell)
        yield cell


def _ready(schedule: Schedule, rank: int, slot: Slot, ended: dict[Op, float], p2p: float) -> float | None:
    """When the last of what the slot needs is at hand; None if some of it has not run yet."""
    needs = [need for op in slot for need in schedule.needs(op)]
    if any(need not in ended for need in needs):
        return None
    return max((ended[need] + (p2p if schedule.rank_of(need) != rank else 0.0) for need in needs), default=0.0)
