"""Lowering: a schedule with the edge that enters and the edge that leaves each op, for the executor to look up.

Edges are read off `Schedule.needs`; nothing here knows which op needs which. A receive is listed on the step whose slot
needs it, so that the executor may post it as early as it has buffers; a fixed early position for each receive would
write one buffer policy into every schedule.
"""

from __future__ import annotations

from typing import Literal

from dryvine.parallel.schedule.ir import Edge, Op, Program, ProgramStep, Schedule


def lower(schedule: Schedule) -> Program:
    """The program of a complete schedule (see `check`): every need that crosses stages becomes an edge."""
    inputs: dict[Op, Edge] = {}
    outputs: dict[Op, Edge] = {}
    for op in schedule.all_ops:
        for source in schedule.needs(op):
            if source.stage != op.stage:
                inputs[op] = outputs[source] = _edge(schedule, source, op)
    ranks = (
        tuple(ProgramStep(slot, tuple(map(inputs.get, slot)), tuple(map(outputs.get, slot))) for slot in slots)
        for slots in schedule.ranks
    )
    return Program(schedule, tuple(ranks))


def _edge(schedule: Schedule, source: Op, target: Op) -> Edge:
    direction: Literal["down", "up"] = "down" if source.stage < target.stage else "up"
    ranks = schedule.rank_of(source), schedule.rank_of(target)
    return Edge(direction, target.route, target.stage, target.microbatch, *ranks)


def forward_only(schedule: Schedule) -> Schedule:
    """The schedule's forwards alone, in its order: what validation runs."""
    forwards = (tuple(tuple(op for op in slot if op.kind == "F") for slot in slots) for slots in schedule.ranks)
    ranks = tuple(tuple(slot for slot in slots if slot) for slots in forwards)
    return Schedule(f"{schedule.name} (forward)", schedule.microbatches, schedule.routes, ranks)
