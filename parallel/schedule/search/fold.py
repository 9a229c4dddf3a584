"""What the search moves: a pipe folded at its turn, as rows of letters.

A V visits every rank twice; DualPipe, mirrored in its middle, is the same V on half the ranks (rank p and rank P-1-p do
the same at the same time, in opposite directions). So one form serves both: `rows[p]` is a list of slots, and a slot is
one or two letters (kind, leg), leg 0 on the way to the fold and 1 on the way back. Microbatches are alike, so each leg
takes them in order: a letter's number is how often it came before, no rearrangement can lose an op or break a
communicator's order, and the space is smaller by all relabellings. Which op waits for which is read off a lowered
schedule of the pipe.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dryvine.parallel.schedule.costs import KINDS, Costs
from dryvine.parallel.schedule.ir import Edge, Kind, Op, Schedule, Slot
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.rules import opposite, vee

Letter = tuple[Kind, int]  # kind, leg
Letters = tuple[Letter, ...]  # a slot
Row = list[Letters]

# Times of arrival are kept in one list. Two places in it are fixed: one that is always there, and one never read.
NOTHING, NOWHERE = 0, 1


class FoldedOp(NamedTuple):
    """An op in the folded pipe. In a mirrored pipe it stands for two, one in each direction."""

    rank: int
    kind: Kind
    leg: int
    number: int  # of the microbatch in its leg


class Wait(NamedTuple):
    """The arrival that an op waits for, the one that it makes, and the time from its end to that arrival."""

    needs: int
    makes: int
    lag: float


@dataclass(frozen=True)
class Pipe:
    """`ranks` folded ranks, `share` microbatches through them; `mirrored`: a DualPipe of twice the ranks, else a V."""

    ranks: int
    share: int
    memory: int  # live chunks that a rank may hold
    costs: Costs
    mirrored: bool

    @property
    def stages(self) -> int:
        return 2 * self.ranks

    @cached_property
    def prices(self) -> dict[Letters, float]:
        """The time of every possible slot."""
        letters: list[Letter] = [(kind, leg) for kind in KINDS for leg in (0, 1)]
        pairs: dict[Letters, float] = {(a, b): self.costs.pair(a[0], b[0]) for a in letters for b in letters}
        return pairs | {(a,): self.costs.op(a[0]) for a in letters}

    def folded(self, op: Op) -> FoldedOp:
        """Where an op of an unfolded schedule stands in the folded pipe."""
        rank = min(op.stage, self.stages - 1 - op.stage)
        return FoldedOp(rank, op.kind, int(op.stage >= self.ranks), op.microbatch % self.share)

    @property
    def arrivals(self) -> int:
        """The length of the list of arrivals."""
        return 2 + 2 * self.stages * self.share

    @cached_property
    def waits(self) -> list[dict[Letter, list[Wait]]]:
        """Per rank, letter and microbatch. W has none: it waits only for what its own rank did before (see `read`)."""
        waits: list[dict[Letter, list[Wait]]] = [{} for _ in range(self.ranks)]
        for row, steps in zip(waits, lower(unfold(self, one_by_one(self), "one by one")).ranks, strict=False):
            for step in steps:
                for op, enters, leaves in zip(step.slot, step.inputs, step.outputs, strict=True):
                    row.setdefault((op.kind, self.folded(op).leg), []).append(self._wait(enters, leaves))
        # One by one, every backward is whole. I waits and sends as B does.
        return [row | {("I", leg): row["B", leg] for leg in (0, 1)} for row in waits]

    def _wait(self, enters: Edge | None, leaves: Edge | None) -> Wait:
        lag = self.costs.P2P if leaves and leaves.is_message else 0.0
        return Wait(
            NOTHING if enters is None else self._arrival(enters),
            NOWHERE if leaves is None else self._arrival(leaves),
            lag,
        )

    def _arrival(self, edge: Edge) -> int:
        """The place of an edge in the list of arrivals; the same for the two that mirror each other."""
        return 2 + ((edge.direction == "up") * self.stages + edge.stage) * self.share + edge.microbatch % self.share


def fold(schedule: Schedule) -> list[Row]:
    """The rows of a V, or of a mirrored schedule with two copies: of its first half of the ranks."""
    mirrored = len(schedule.routes) == 2
    ranks = schedule.ranks[: len(schedule.ranks) // 2] if mirrored else schedule.ranks
    turn = schedule.stages // 2
    return [[tuple((op.kind, int(op.stage >= turn)) for op in slot) for slot in row] for row in ranks]


def unfold(pipe: Pipe, rows: list[Row], name: str) -> Schedule:
    """The schedule that the rows stand for: microbatches are numbered, and the other half mirrored."""
    if not pipe.mirrored:
        return Schedule(name, pipe.share, vee(pipe.ranks), tuple(_ops(pipe, p, row) for p, row in enumerate(rows)))
    near = [_ops(pipe, p, row) for p, row in enumerate(rows)]
    far = [tuple(tuple(_opposite(pipe, op) for op in slot) for slot in slots) for slots in near[::-1]]
    return Schedule(name, 2 * pipe.share, opposite(pipe.stages), tuple(near + far))


def _opposite(pipe: Pipe, op: Op) -> Op:
    """The op that the mirrored rank runs at the same time: of the other route, whose microbatches are others."""
    return op._replace(microbatch=(op.microbatch + pipe.share) % (2 * pipe.share), route=1 - op.route)


def _ops(pipe: Pipe, rank: int, row: Row) -> tuple[Slot, ...]:
    """The row's letters as ops. In a mirrored pipe, leg 1 is the other route, whose microbatches come after."""
    stages = (rank, pipe.stages - 1 - rank)
    count: Counter[Letter] = Counter()
    deferred: tuple[deque[int], deque[int]] = (deque(), deque())  # per leg, the microbatches whose W is left

    def number(kind: Kind, leg: int) -> int:
        if kind == "W":
            return deferred[leg].popleft()
        # B and I are one sequence: both take the next microbatch that comes back.
        passed: Letter = ("F" if kind == "F" else "B", leg)
        count[passed] += 1
        if kind == "I":
            deferred[leg].append(count[passed] - 1)
        return count[passed] - 1

    def op(kind: Kind, leg: int) -> Op:
        other = leg if pipe.mirrored else 0
        return Op(kind, stages[leg], other * pipe.share + number(kind, leg), other)

    return tuple(tuple(op(*letter) for letter in slot) for slot in row)


def pairs_itself(pipe: Pipe, row: Row) -> bool:
    """Whether the row pairs a microbatch with itself, in the two stages that a rank of a V holds."""
    return any(len({op.microbatch for op in slot}) < len(slot) for slot in _ops(pipe, 0, row))


def one_by_one(pipe: Pipe) -> list[Row]:
    """One microbatch after another through the whole pipe, all backwards whole."""
    there_and_back: Row = [(("F", 0),), (("F", 1),), (("B", 1),), (("B", 0),)]
    return [there_and_back * pipe.share for _ in range(pipe.ranks)]


def tidy(pipe: Pipe, row: Row) -> Row:
    """The row without pairs that save nothing, such as W&W."""

    def saves(slot: Letters) -> bool:
        return pipe.prices[slot] < sum(pipe.prices[(letter,)] for letter in slot) - 1e-9

    return _flat([slot] if saves(slot) else [(letter,) for letter in slot] for slot in row)


def split(row: Row) -> Row:
    """The row with I for each B, and its W right after."""

    def parts(slot: Letters) -> Row:
        inputs: Letters = tuple(("I" if kind == "B" else kind, leg) for kind, leg in slot)
        return [inputs, *((("W", leg),) for kind, leg in slot if kind == "B")]

    return _flat(map(parts, row))


def _flat(pieces: Iterable[Row]) -> Row:
    return [slot for piece in pieces for slot in piece]
