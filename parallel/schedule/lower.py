"""A schedule with its messages. Sends leave right after the slot that made them, in op order; receives are listed on
the step whose slot needs them, in op order, so that the executor may post them as early as it has buffers.

The alternative, a fixed early position for each receive, would bake one buffer policy into every schedule. Two stages
on one rank (the turn of a V) hand over in memory: no message.
"""

from __future__ import annotations

from collections.abc import Iterator

from dryvine.parallel.schedule.ir import Edge, Op, Program, Schedule, Slot, Step


def _edge(schedule: Schedule, op: Op, step: int, receiving: bool) -> Iterator[Edge]:
    """The message between `op` and its neighbour `step` stages on, if there is one and it stands on another rank."""
    neighbour, route = op.stage + step, schedule.routes[op.route]
    if not 0 <= neighbour < schedule.stages or route[neighbour] == route[op.stage]:
        return
    here, there = (op.stage, neighbour) if not receiving else (neighbour, op.stage)
    yield Edge("down" if there > here else "up", op.route, there, op.microbatch, route[here], route[there])


def _receives(schedule: Schedule, slot: Slot) -> Iterator[Edge]:
    for op in slot:
        if op.kind != "W":
            yield from _edge(schedule, op, -1 if op.kind == "F" else 1, receiving=True)


def _sends(schedule: Schedule, slot: Slot) -> Iterator[Edge]:
    for op in slot:
        if op.kind != "W":
            yield from _edge(schedule, op, 1 if op.kind == "F" else -1, receiving=False)


def lower(schedule: Schedule) -> Program:
    """Each rank's slots with the messages that they wait for and send."""
    return tuple(
        tuple(Step(slot, tuple(_receives(schedule, slot)), tuple(_sends(schedule, slot))) for slot in slots)
        for slots in schedule.ranks
    )


def forward_only(schedule: Schedule) -> Schedule:
    """The schedule's forwards alone, in its order: what validation runs."""
    ranks = tuple(
        tuple(kept for slot in slots if (kept := tuple(op for op in slot if op.kind == "F")))
        for slots in schedule.ranks
    )
    return Schedule(f"{schedule.name} (forward)", schedule.microbatches, schedule.routes, ranks)
