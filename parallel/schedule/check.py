"""Proof that a schedule can run: every op once and on its rank, no cyclic wait, messages in one order at both ends.

Run before any process group is made, on every schedule, also on generated and searched ones: a schedule that passes
cannot hang the executor or skip a gradient. The alternative is to learn it from a NCCL timeout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NoReturn

from dryvine.parallel.schedule.grid import excerpt
from dryvine.parallel.schedule.ir import Edge, Op, Schedule, Slot
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.notation import op_text, slot_text
from dryvine.parallel.schedule.rules import ScheduleError

Place = tuple[int, int]  # rank, slot


def check(schedule: Schedule) -> None:
    """Raise ScheduleError, with the grid round the bad slot, unless every rank can run its slots to the end.

    A schedule of forwards alone is complete too; otherwise every F needs its B, or its I and W.
    """
    places = _places(schedule)
    _complete(schedule, places)
    _progress(schedule, places)
    _order(schedule)


def _fail(schedule: Schedule, place: Place, what: str) -> NoReturn:
    rank, slot = place
    raise ScheduleError(f"{schedule.name}: rank {rank}, slot {slot}: {what}\n{excerpt(schedule, rank, slot)}")


def _slots(schedule: Schedule) -> Iterator[tuple[Place, Slot]]:
    for rank, slots in enumerate(schedule.ranks):
        for i, slot in enumerate(slots):
            yield (rank, i), slot


def _places(schedule: Schedule) -> dict[Op, Place]:
    """Where each op stands; every op exists, stands on its rank, and stands there once."""
    places: dict[Op, Place] = {}
    route_of: dict[int, int] = {}
    for place, slot in _slots(schedule):
        if len(slot) not in (1, 2) or len({op.microbatch for op in slot}) < len(slot):
            _fail(schedule, place, f"{slot_text(slot)} is neither one op nor two ops of different microbatches")
        for op in slot:
            _fits(schedule, place, op)
            if op in places:
                _fail(schedule, place, f"{op_text(op)} runs twice, first on rank {places[op][0]}, slot {places[op][1]}")
            if route_of.setdefault(op.microbatch, op.route) != op.route:
                _fail(
                    schedule,
                    place,
                    f"microbatch {op.microbatch} travels routes {route_of[op.microbatch]} and {op.route}",
                )
            places[op] = place
    return places


def _fits(schedule: Schedule, place: Place, op: Op) -> None:
    known = op.route < len(schedule.routes) and 0 <= op.stage < schedule.stages
    if not known or not 0 <= op.microbatch < schedule.microbatches:
        sizes = f"{schedule.stages} stages, {schedule.microbatches} microbatches, {len(schedule.routes)} routes"
        _fail(schedule, place, f"{op} lies outside the schedule ({sizes}, counted from 0)")
    if schedule.rank_of(op) != place[0]:
        _fail(schedule, place, f"{op_text(op)} stands on the wrong rank; its stage is on rank {schedule.rank_of(op)}")


def _complete(schedule: Schedule, places: dict[Op, Place]) -> None:
    training = any(op.kind != "F" for op in places)
    route_of = {op.microbatch: op.route for op in places}
    for m in range(schedule.microbatches):
        if m not in route_of:
            raise ScheduleError(f"{schedule.name}: microbatch {m} of {schedule.microbatches} appears nowhere")
        for s in range(schedule.stages):
            _whole(schedule, places, Op("F", s, m, route_of[m]), training)


def _whole(schedule: Schedule, places: dict[Op, Place], forward: Op, training: bool) -> None:
    whole, inputs, weights = (forward._replace(kind=kind) for kind in ("B", "I", "W"))
    backward = {op for op in (whole, inputs, weights) if op in places}
    wanted = ({whole}, {inputs, weights}) if training else (set(),)
    if forward in places and backward in wanted:
        return
    rank = schedule.rank_of(forward)
    near = [places[op] for op in (forward, *sorted(backward)) if op in places]
    place = near[0] if near else (rank, len(schedule.ranks[rank]))
    if forward not in places:
        _fail(schedule, place, f"{op_text(forward)} is missing on rank {rank}")
    has = " and ".join(map(op_text, sorted(backward))) or "no backward"
    mend = f"{op_text(whole)}, or {op_text(inputs)} and {op_text(weights)}"
    _fail(schedule, place, f"{op_text(forward)} has {has}; it needs {mend}")


def _progress(schedule: Schedule, places: dict[Op, Place]) -> None:
    """Run it without time: each rank goes on while what its slot needs has ended."""
    ended: set[Op] = set()
    at = [0] * len(schedule.ranks)
    moved = True
    while moved:
        moved = False
        for rank, slots in enumerate(schedule.ranks):
            while at[rank] < len(slots) and not _waits(schedule, slots[at[rank]], ended):
                ended.update(slots[at[rank]])
                at[rank] += 1
                moved = True
    stuck = [rank for rank, slots in enumerate(schedule.ranks) if at[rank] < len(slots)]
    if stuck:
        _explain_stuck(schedule, places, at, stuck[0], ended)


def _waits(schedule: Schedule, slot: Slot, ended: set[Op]) -> list[tuple[Op, Op]]:
    """(op, what it waits for) for each need of the slot that has not ended."""
    return [(op, need) for op in slot for need in schedule.needs(op) if need not in ended]


def _explain_stuck(schedule: Schedule, places: dict[Op, Place], at: list[int], rank: int, ended: set[Op]) -> NoReturn:
    """Follow the waits from rank to rank until they close a circle, and tell that circle."""
    told: dict[int, str] = {}
    while rank not in told:
        op, need = _waits(schedule, schedule.ranks[rank][at[rank]], ended)[0]
        other, slot = places[need]
        told[rank] = (
            f"{op_text(op)} (rank {rank}, slot {at[rank]}) waits for {op_text(need)} (rank {other}, slot {slot})"
        )
        rank = other
    circle = list(told)[list(told).index(rank) :]
    _fail(schedule, (rank, at[rank]), "cyclic wait: " + "; ".join(told[r] for r in circle))


def _order(schedule: Schedule) -> None:
    """On each communicator (route, direction), what one rank sends to another is received in the order it was sent."""
    sent: dict[tuple[object, ...], list[tuple[Edge, Place]]] = defaultdict(list)
    received: dict[tuple[object, ...], list[tuple[Edge, Place]]] = defaultdict(list)
    for rank, steps in enumerate(lower(schedule).ranks):
        for i, step in enumerate(steps):
            for edges, log in ((step.sends, sent), (step.receives, received)):
                for edge in edges:
                    log[edge.route, edge.direction, edge.source, edge.target].append((edge, (rank, i)))
    for channel, sends in sent.items():
        for (there, origin), (here, place) in zip(sends, received[channel], strict=True):
            if there != here:
                route, direction, source, _ = channel
                _fail(
                    schedule,
                    place,
                    f"communicator order ({direction}, route {route}): stage {here.stage} takes microbatch "
                    f"{here.microbatch} next, but rank {source} sends microbatch {there.microbatch} for stage "
                    f"{there.stage} first (slot {origin[1]})",
                )
