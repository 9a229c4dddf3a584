"""Proof that a schedule can run: every op once and on its rank, no cyclic wait, messages in one order at both ends.

Run before any process group is made, on every schedule, also on generated and searched ones: a schedule that passes
cannot hang the executor or skip a gradient. The alternative is to learn it from a NCCL timeout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NoReturn

from dryvine.parallel.schedule.grid import excerpt
from dryvine.parallel.schedule.ir import Edge, Op, Program, ProgramStep, Schedule, Slot
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.notation import op_text, slot_text
from dryvine.parallel.schedule.rules import ScheduleError

Position = tuple[int, int]  # rank, slot
Messages = dict[
    tuple[int, str, int, int], list[tuple[Edge, Position]]
]  # (route, direction, source, target) -> in order


def check(schedule: Schedule) -> Program:
    """The program of a schedule that every rank can run to the end; else raise ScheduleError, with the grid round the
    bad slot.

    A schedule of forwards alone is complete too; otherwise every F needs its B, or its I and W.
    """
    checker = _Checker(schedule)
    checker.place_ops()
    checker.complete()
    checker.progress()
    program = lower(schedule)
    checker.message_order(program)
    return program


class _Checker:
    """The checks in the order in which they build on each other."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.positions: dict[Op, Position] = {}
        self.route_of: dict[int, int] = {}  # by microbatch

    def _fail(self, position: Position, what: str) -> NoReturn:
        rank, slot = position
        grid = excerpt(self.schedule, rank, slot)
        raise ScheduleError(f"{self.schedule.name}: rank {rank}, slot {slot}: {what}\n{grid}")

    def place_ops(self) -> None:
        """Every op exists, stands on its rank, and stands there once."""
        for rank, slots in enumerate(self.schedule.ranks):
            for i, slot in enumerate(slots):
                if len(slot) not in (1, 2) or len({op.microbatch for op in slot}) < len(slot):
                    what = f"{slot_text(slot)} is neither one op nor two ops of different microbatches"
                    self._fail((rank, i), what)
                for op in slot:
                    self._place(op, (rank, i))

    def _place(self, op: Op, position: Position) -> None:
        self._fits(op, position)
        if op in self.positions:
            rank, slot = self.positions[op]
            self._fail(position, f"{op_text(op)} runs twice, first on rank {rank}, slot {slot}")
        route = self.route_of.setdefault(op.microbatch, op.route)
        if route != op.route:
            self._fail(position, f"microbatch {op.microbatch} travels routes {route} and {op.route}")
        self.positions[op] = position

    def _fits(self, op: Op, position: Position) -> None:
        schedule = self.schedule
        known = op.route < len(schedule.routes) and 0 <= op.stage < schedule.stages
        if not known or not 0 <= op.microbatch < schedule.microbatches:
            sizes = f"{schedule.stages} stages, {schedule.microbatches} microbatches, {len(schedule.routes)} routes"
            self._fail(position, f"{op} lies outside the schedule ({sizes}, counted from 0)")
        rank = schedule.rank_of(op)
        if rank != position[0]:
            self._fail(position, f"{op_text(op)} stands on the wrong rank; its stage is on rank {rank}")

    def complete(self) -> None:
        """Every microbatch passes every stage, forward and (when training) back."""
        schedule = self.schedule
        training = any(op.kind != "F" for op in self.positions)
        for m in range(schedule.microbatches):
            if m not in self.route_of:
                raise ScheduleError(f"{schedule.name}: microbatch {m} of {schedule.microbatches} appears nowhere")
            for s in range(schedule.stages):
                self._complete_stage(Op("F", s, m, self.route_of[m]), training)

    def _complete_stage(self, forward: Op, training: bool) -> None:
        whole, inputs, weights = (forward._replace(kind=kind) for kind in ("B", "I", "W"))
        backward = {op for op in (whole, inputs, weights) if op in self.positions}
        allowed = ({whole}, {inputs, weights}) if training else (set(),)
        if forward in self.positions and backward in allowed:
            return
        # Point to what is there of this stage and microbatch, else to the end of the rank.
        rank = self.schedule.rank_of(forward)
        near = [self.positions[op] for op in (forward, *sorted(backward)) if op in self.positions]
        position = near[0] if near else (rank, len(self.schedule.ranks[rank]))
        if forward not in self.positions:
            self._fail(position, f"{op_text(forward)} is missing on rank {rank}")
        has = " and ".join(map(op_text, sorted(backward))) or "no backward"
        fix = f"{op_text(whole)}, or {op_text(inputs)} and {op_text(weights)}"
        self._fail(position, f"{op_text(forward)} has {has}; it needs {fix}")

    def progress(self) -> None:
        """Run it without time: each rank goes on while what its slot needs has ended."""
        ended: set[Op] = set()
        at = [0] * len(self.schedule.ranks)
        moved = True
        while moved:
            moved = False
            for rank, slots in enumerate(self.schedule.ranks):
                while at[rank] < len(slots) and not self._waits(slots[at[rank]], ended):
                    ended.update(slots[at[rank]])
                    at[rank] += 1
                    moved = True
        stuck = [rank for rank, slots in enumerate(self.schedule.ranks) if at[rank] < len(slots)]
        if stuck:
            self._explain_stuck(at, stuck[0], ended)

    def _waits(self, slot: Slot, ended: set[Op]) -> list[tuple[Op, Op]]:
        """(op, what it waits for) for each need of the slot that has not ended."""
        return [(op, need) for op in slot for need in self.schedule.needs(op) if need not in ended]

    def _explain_stuck(self, at: list[int], rank: int, ended: set[Op]) -> NoReturn:
        """Follow the waits from rank to rank until they close a circle, and report that circle."""
        waits: dict[int, str] = {}
        while rank not in waits:
            op, need = self._waits(self.schedule.ranks[rank][at[rank]], ended)[0]
            other, slot = self.positions[need]
            here, there = f"(rank {rank}, slot {at[rank]})", f"(rank {other}, slot {slot})"
            waits[rank] = f"{op_text(op)} {here} waits for {op_text(need)} {there}"
            rank = other
        circle = list(waits)[list(waits).index(rank) :]
        self._fail((rank, at[rank]), "cyclic wait: " + "; ".join(waits[r] for r in circle))

    def message_order(self, program: Program) -> None:
        """On each communicator (route, direction), two ranks send and receive messages in the same order."""
        received = _by_channel((edge, at) for step, at in _steps(program) for edge in step.receives)
        sent = _by_channel((edge, at) for step, at in _steps(program) for edge in step.sends)
        for channel, sends in sent.items():
            for (sends_next, origin), (takes_next, position) in zip(sends, received[channel], strict=True):
                if sends_next != takes_next:
                    self._fail(
                        position,
                        f"communicator order ({takes_next.direction}, route {takes_next.route}): stage "
                        f"{takes_next.stage} takes microbatch {takes_next.microbatch} next, but rank "
                        f"{sends_next.source} sends microbatch {sends_next.microbatch} for stage "
                        f"{sends_next.stage} first (slot {origin[1]})",
                    )


def _steps(program: Program) -> Iterator[tuple[ProgramStep, Position]]:
    for rank, steps in enumerate(program.ranks):
        for i, step in enumerate(steps):
            yield step, (rank, i)


def _by_channel(messages: Iterable[tuple[Edge, Position]]) -> Messages:
    channels: Messages = defaultdict(list)
    for edge, position in messages:
        channels[edge.route, edge.direction, edge.source, edge.target].append((edge, position))
    return channels
