"""What the ranks of a schedule hold, send and run, counted once for whatever sizes and prices are asked about.

A sweep asks the same schedule about hundreds of layouts. Its ops are walked once for each question; an answer is then
a product with a few counts, equal to what walking the schedule with those sizes finds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from operator import ge, mul
from typing import NamedTuple

from dryvine.parallel.schedule.ir import Kind, Op, Schedule, Slot

RUNNING: tuple[Kind, ...] = ("F", "I", "B")  # ops that may need memory while they run


class SlotCount(NamedTuple):
    """Slots of the same kinds and stages: one of them, and how many a rank has."""

    slot: Slot
    times: int


class SlotMessages(NamedTuple):
    """Of one slot: the ops on other ranks whose output it waits for, and how many messages leave when it has ended."""

    receives: tuple[Op, ...]
    sends: int


class Footprint:
    """Of one schedule. Nothing is counted before it is asked for."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def most_held(
        self,
        rank: int,
        sizes: Mapping[int, int],
        left: Mapping[int, int] | None = None,
        running: Mapping[tuple[Kind, int], int] | None = None,
    ) -> int:
        """The most that a rank holds at once of microbatches in flight: `sizes[stage]` from the start of F to the end
        of B or W, what an I has `left` until its W, and while a slot runs, what each (kind, stage) of its ops needs
        beside. No size is negative.

        I releases nothing: the weight gradients still need the inputs. A slot's ops take before any of them frees, as
        a pair holds both.
        """
        stages, left, running = self.schedule.stages_of(rank), left or {}, running or {}
        each = [sizes[stage] for stage in stages] + [left.get(stage, 0) for stage in stages]
        each += [running.get((kind, stage), 0) for kind in RUNNING for stage in stages]
        return max((sum(map(mul, each, counts)) for counts in self._held[rank]), default=0)

    @cached_property
    def messages(self) -> tuple[list[SlotMessages], ...]:
        """Of each slot of each rank."""
        receives, sends = self._crossings()

        def of(slot: Slot) -> SlotMessages:
            return SlotMessages(tuple(source for op in slot for source in receives[op]), sum(sends[op] for op in slot))

        return tuple([of(slot) for slot in slots] for slots in self.schedule.ranks)

    @cached_property
    def slots(self) -> tuple[tuple[SlotCount, ...], ...]:
        """Of each rank, its slots by kinds and stages of their ops."""
        return tuple(_counted(slots) for slots in self.schedule.ranks)

    @cached_property
    def _held(self) -> tuple[list[tuple[int, ...]], ...]:
        """Of each rank, the counts of microbatches that it holds at once, those left out that others exceed: of each of
        its stages from F to B or W, then of each from I to W, then of each running an op, by RUNNING."""
        return tuple(_maximal(self._held_by(rank)) for rank in range(len(self.schedule.ranks)))

    def _held_by(self, rank: int) -> set[tuple[int, ...]]:
        place = {stage: number for number, stage in enumerate(self.schedule.stages_of(rank))}
        now, found = [0] * (2 * len(place)), set[tuple[int, ...]]()
        for slot in self.schedule.ranks[rank]:
            for op in slot:
                if op.kind in "FI":
                    now[place[op.stage] + (len(place) if op.kind == "I" else 0)] += 1
            ops = Counter((op.kind, op.stage) for op in slot)
            found.add((*now, *(ops[kind, stage] for kind in RUNNING for stage in place)))
            for op in slot:
                if op.kind in "BW":
                    now[place[op.stage]] -= 1
                if op.kind == "W":
                    now[place[op.stage] + len(place)] -= 1
        return found

    def _crossings(self) -> tuple[defaultdict[Op, list[Op]], Counter[Op]]:
        """The ops on other ranks that each op waits for, and how often each op is waited for there."""
        schedule, receives, sends = self.schedule, defaultdict[Op, list[Op]](list), Counter[Op]()
        for op in schedule.all_ops:
            for source in schedule.needs(op):
                if schedule.rank_of(source) != schedule.rank_of(op):
                    receives[op].append(source)
                    sends[source] += 1
        return receives, sends


def _maximal(vectors: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that no other one reaches in every element. Sorted, only an earlier one can."""
    kept: list[tuple[int, ...]] = []
    for one in sorted(vectors, reverse=True):
        if not any(all(map(ge, other, one)) for other in kept):
            kept.append(one)
    return kept


def _counted(slots: Iterable[Slot]) -> tuple[SlotCount, ...]:
    found: dict[tuple[tuple[Kind, int], ...], list[Slot]] = {}
    for slot in slots:
        found.setdefault(tuple(sorted((op.kind, op.stage) for op in slot)), []).append(slot)
    return tuple(SlotCount(alike[0], len(alike)) for alike in found.values())
