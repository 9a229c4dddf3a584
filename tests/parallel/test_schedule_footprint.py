"""What is counted once of a schedule is what walking it finds, for any sizes."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import pytest

from dryvine.parallel.flow_control import most_messages
from dryvine.parallel.schedule.footprint import RUNNING, Footprint
from dryvine.parallel.schedule.ir import Kind, ProgramStep, Schedule
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.simulate import simulate
from dryvine.parallel.schedule.table import SCHEDULES, build

SCHEDULE_SIZES = [(name, pp, microbatches) for name in SCHEDULES for pp, microbatches in ((2, 8), (4, 16))]


Running = Mapping[tuple[Kind, int], int]


def walked(schedule: Schedule, rank: int, kept: Mapping[int, int], left: Mapping[int, int], running: Running) -> int:
    now = most = 0
    for slot in schedule.ranks[rank]:
        now += sum({"F": kept, "I": left}.get(op.kind, {}).get(op.stage, 0) for op in slot)
        most = max(most, now + sum(running.get((op.kind, op.stage), 0) for op in slot))
        now -= sum(kept[op.stage] * (op.kind in "BW") + left[op.stage] * (op.kind == "W") for op in slot)
    return most


def messages(steps: tuple[ProgramStep, ...], ahead: int) -> int:
    """Slot by slot: what was posted and has not been taken, and what the slot before sent."""
    most = before = 0
    for number, step in enumerate(steps):
        posted = sum(len(other.receives) for other in steps[number : number + ahead + 1])
        most = max(most, posted + before)
        before = len(step.sends)
    return most


@pytest.mark.parametrize(("name", "pp", "microbatches"), SCHEDULE_SIZES)
def test_what_ranks_hold_and_send(name: str, pp: int, microbatches: int) -> None:
    schedule, random = build(name, pp, microbatches), Random(0)
    footprint, program = Footprint(schedule), lower(schedule)
    for _ in range(5):
        kept, left = ({s: random.randrange(100) for s in range(schedule.stages)} for _ in range(2))
        running = {(kind, s): random.randrange(100) for kind in RUNNING for s in range(schedule.stages)}
        for rank in range(pp):
            assert footprint.most_held(rank, kept, left) == walked(schedule, rank, kept, left, {})
            assert footprint.most_held(rank, kept, left, running) == walked(schedule, rank, kept, left, running)
    for rank, ahead in ((rank, ahead) for rank in range(pp) for ahead in (1, 2)):
        assert most_messages(footprint.messages[rank], ahead) == messages(program.ranks[rank], ahead)


@pytest.mark.parametrize(("name", "pp", "microbatches"), SCHEDULE_SIZES)
def test_slots_are_all_there(name: str, pp: int, microbatches: int) -> None:
    schedule = build(name, pp, microbatches)
    busy = [sum(cell.end - cell.start for cell in row) for row in simulate(schedule).cells]
    for rank, slots in enumerate(Footprint(schedule).slots):
        assert sum(times for _, times in slots) == len(schedule.ranks[rank])
        # Op by op: F, I and W cost 1, B costs 2, and pairs hide nothing.
        assert sum(times * (2 if op.kind == "B" else 1) for slot, times in slots for op in slot) == busy[rank]
