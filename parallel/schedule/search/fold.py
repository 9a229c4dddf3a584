"""What the search moves: a pipe folded at its turn, as rows of letters.

A V visits every rank twice; DualPipe, mirrored in its middle, is the same V on half the ranks (rank p and rank P-1-p do
the same at the same time, in opposite directions). So one form serves both: `rows[p]` is a list of slots, and a slot
one or two letters (kind, turn), turn 0 on the way to the fold and 1 on the way back. Microbatches are alike, so each
turn takes them in order: a letter's number is how often it came before, no rearrangement can lose an op or break a
communicator's order, and the space is smaller by all relabellings.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from functools import cached_property

from dryvine.parallel.schedule.costs import KINDS, Costs
from dryvine.parallel.schedule.ir import Kind, Op, Schedule
from dryvine.parallel.schedule.rules import vee

Letter = tuple[Kind, int]
Letters = tuple[Letter, ...]
Row = list[Letters]

# A slot as the evaluation reads it: its time; the time of it and all after it; two places in the list of arrivals that
# it waits for; two that it makes; and the lag from its end to each of those arrivals. A tuple, for speed.
Task = tuple[float, float, int, int, int, int, float, float]
Edge = tuple[int, int, float]  # the arrival that an op waits for, the one it makes, and the lag
Counts = tuple[int, int, int, int, int, int, int]  # before a slot: F, backwards, deferred W, of each turn; chunks held
Reading = tuple[list[Task], list[Counts]]

NOTHING, NOWHERE = 0, 1  # an arrival that is always there, and one that nobody reads
UNBOUND: Edge = (NOTHING, NOWHERE, 0.0)
START: Counts = (0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Pipe:
    """`ranks` folded ranks, `share` microbatches through them; `mirrored`: a DualPipe of twice the ranks, else a V."""

    ranks: int
    share: int
    memory: int  # live chunks that a rank may hold
    costs: Costs
    mirrored: bool

    @cached_property
    def prices(self) -> dict[Letters, float]:
        letters: list[Letter] = [(kind, turn) for kind in KINDS for turn in (0, 1)]
        pairs: dict[Letters, float] = {(a, b): self.costs.pair(a[0], b[0]) for a in letters for b in letters}
        return pairs | {(a,): self.costs.op(a[0]) for a in letters}

    @property
    def arrivals(self) -> int:
        return 2 + 4 * self.ranks * self.share

    @cached_property
    def edges(self) -> list[dict[Letter, list[Edge]]]:
        """Per rank, letter and microbatch: what it waits for and makes."""

        def edge(rank: int, kind: Kind, turn: int, number: int) -> Edge:
            place = (rank, turn, kind != "F")
            return self._need(*place, number), self._place(*place, number), self._lag(*place)

        moving: list[Letter] = [(kind, turn) for kind in KINDS if kind != "W" for turn in (0, 1)]
        numbers = range(self.share)
        return [{at: [edge(rank, *at, i) for i in numbers] for at in moving} for rank in range(self.ranks)]

    def _place(self, rank: int, turn: int, back: bool, number: int) -> int:
        return 2 + ((rank * 2 + turn) * 2 + back) * self.share + number

    def _need(self, rank: int, turn: int, back: bool, number: int) -> int:
        """What its own rank did before is not waited for: `read` sees to that order."""
        before = rank + 1 if turn != back else rank - 1
        if before < 0:
            return NOTHING
        if before == self.ranks:
            return self._place(rank, 1 - turn, back, number)
        return self._place(before, turn, back, number)

    def _lag(self, rank: int, turn: int, back: bool) -> float:
        """In a V the two turns meet on one rank, without a message."""
        at_fold = rank == self.ranks - 1 and turn == back
        return 0.0 if at_fold and not self.mirrored else self.costs.P2P


def read(pipe: Pipe, rank: int, slots: Row, at: Counts = START, rest: float = 0.0) -> Reading | None:
    """The tasks of `slots`, which stand after `at` on the rank and before `rest` of time; None if it cannot run them:
    an op before what it needs there, or more chunks held than allowed. One loop: the search lives in it."""
    prices, memory = pipe.prices, pipe.memory
    edges = pipe.edges[rank]
    f, b, w = [at[0], at[1]], [at[2], at[3]], [at[4], at[5]]
    held = at[6]
    counts, found = list[Counts](), []
    for slot in slots:
        counts.append((f[0], f[1], b[0], b[1], w[0], w[1], held))
        done, ready, freed, parts = (f[0], f[1]), [w[0], w[1]], 0, []
        for letter in slot:
            kind, turn = letter
            if kind == "W":
                if not ready[turn]:
                    return None
                ready[turn] -= 1
                w[turn] -= 1
                freed += 1
                parts.append(UNBOUND)
                continue
            if kind == "F":
                parts.append(edges[letter][f[turn]])
                f[turn] += 1
                held += 1
                continue
            if b[turn] >= done[turn]:
                return None
            parts.append(edges[letter][b[turn]])
            b[turn] += 1
            if kind == "I":
                w[turn] += 1
            else:
                freed += 1
        if held > memory:
            return None
        held -= freed
        found.append((prices[slot], parts))
    tasks = list[Task]()
    for time, parts in reversed(found):
        rest += time
        a, x, p = parts[0]
        other, y, q = parts[1] if len(parts) == 2 else UNBOUND
        tasks.append((time, rest, a, other, x, y, p, q))
    return tasks[::-1], counts


def fold(schedule: Schedule) -> list[Row]:
    """The rows of a V, or of a mirrored schedule with two copies: of its first half of the ranks."""
    mirrored = len(schedule.routes) == 2
    ranks = schedule.ranks[: len(schedule.ranks) // 2] if mirrored else schedule.ranks
    first = len(schedule.ranks)

    def letter(op: Op) -> Letter:
        return op.kind, op.route if mirrored else int(op.stage >= first)

    return [[tuple(letter(op) for op in slot) for slot in row] for row in ranks]


def unfold(pipe: Pipe, rows: list[Row], name: str) -> Schedule:
    """The schedule that the rows stand for: numbers given, and the other half mirrored."""
    if not pipe.mirrored:
        last = 2 * pipe.ranks - 1
        ranks = tuple(_numbered(row, (p, last - p), (0, 0), (0, 0)) for p, row in enumerate(rows))
        return Schedule(name, pipe.share, vee(pipe.ranks), ranks)
    there, share = tuple(range(2 * pipe.ranks)), pipe.share
    near = [_numbered(row, (p, there[-1] - p), (0, 1), (0, share)) for p, row in enumerate(rows)]
    far = [_numbered(row, (p, there[-1] - p), (1, 0), (share, 0)) for p, row in enumerate(rows)]
    return Schedule(name, 2 * share, (there, there[::-1]), tuple(near + far[::-1]))


def tidy(pipe: Pipe, row: Row) -> Row:
    """The row without pairs that save nothing, such as W&W."""
    price = pipe.prices
    out: Row = []
    for slot in row:
        saves = price[slot] < sum(price[(letter,)] for letter in slot) - 1e-9
        out += [slot] if saves else [(letter,) for letter in slot]
    return out


def split(row: Row) -> Row:
    """The row with I for each B, and its W right after."""
    out: Row = []
    for slot in row:
        out.append(tuple(("I" if kind == "B" else kind, turn) for kind, turn in slot))
        out += [(("W", turn),) for kind, turn in slot if kind == "B"]
    return out


def _numbered(
    row: Row, stages: tuple[int, int], routes: tuple[int, int], firsts: tuple[int, int]
) -> tuple[tuple[Op, ...], ...]:
    count: Counter[tuple[str, int]] = Counter()
    deferred: tuple[deque[int], deque[int]] = (deque(), deque())
    slots = []
    for slot in row:
        ops = []
        for kind, turn in slot:
            if kind == "W":
                number = deferred[turn].popleft()
            else:
                passed = ("F" if kind == "F" else "B", turn)
                number = count[passed]
                count[passed] += 1
                if kind == "I":
                    deferred[turn].append(number)
            ops.append(Op(kind, stages[turn], firsts[turn] + number, routes[turn]))
        slots.append(tuple(ops))
    return tuple(slots)


def pairs_itself(row: Row) -> bool:
    """Whether a V's row pairs a microbatch with itself, in the rank's two stages."""
    return any(len({op.microbatch for op in slot}) < len(slot) for slot in _numbered(row, (0, 1), (0, 0), (0, 0)))
