"""The true optimum of a small pipe, or a proven bound, by OR-tools CP-SAT (extra `search`).

Ops of a folded pipe with integer times; a literal per pair that saves time; one no-overlap per rank over the ops that
lead a slot; memory as a cumulative from the start of F to the end of W. Whole backwards are left out where splitting
costs nothing: an I and a W can then do all that a B can. Good for some dozens of ops a rank; beyond that the annealing
finds more in the same time.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from types import ModuleType
from typing import TYPE_CHECKING

from dryvine.comm.extras import lacking
from dryvine.parallel.schedule.ir import Kind
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.search.fold import FoldedOp, Pipe, Row, one_by_one, split, unfold

if TYPE_CHECKING:
    from ortools.sat.python.cp_model import BoolVarT, CpSolver, IntVar

TICKS = 240  # integer ticks per unit of time
SPLIT: tuple[Kind, ...] = ("F", "I", "W")


@dataclass(frozen=True)
class Optimum:
    """`rows`, None if none was found in time, and `bound`: no schedule of this pipe has a shorter span."""

    rows: list[Row] | None
    span: float
    bound: float

    @property
    def proven(self) -> bool:
        return self.rows is not None and self.span <= self.bound * (1 + 1e-3)


class _Constraints:
    """The pipe as a CP-SAT model: a start and an end for each op, and a literal for each pair that may be."""

    def __init__(self, cp: ModuleType, pipe: Pipe, horizon: float) -> None:
        self.pipe, self.model = pipe, cp.CpModel()
        self.horizon = int(horizon * TICKS) + 1
        numbers, legs = range(pipe.share), (0, 1)
        self.ops = [FoldedOp(r, k, leg, i) for r in range(pipe.ranks) for k in SPLIT for leg in legs for i in numbers]
        self.start: dict[FoldedOp, IntVar] = {op: self._time() for op in self.ops}
        self.end: dict[FoldedOp, IntVar] = {op: self._time() for op in self.ops}
        self.pairs: dict[tuple[FoldedOp, FoldedOp], BoolVarT] = {}
        self.span = self._time()
        for rank in range(pipe.ranks):
            own = [op for op in self.ops if op.rank == rank]
            self._slots(own)
            self._memory(own)
            self._work(own)
        for op in self.ops:
            self._in_order(op)
            self.model.add(self.span >= self.end[op])
        self._needs()
        self.model.minimize(self.span)

    def _time(self) -> IntVar:
        return self.model.new_int_var(0, self.horizon, "")

    def _ticks(self, *kinds: Kind) -> int:
        """Rounded down, so that the bound stays one; the true span is taken from the rows."""
        letters = tuple((kind, 0) for kind in kinds)
        return int(self.pipe.prices[letters] * TICKS + 1e-6)

    def _slots(self, ops: list[FoldedOp]) -> None:
        """Of one rank: each op is alone or in one pair, and slots do not overlap."""
        model, of_op = self.model, defaultdict(list)
        follows = defaultdict(list)
        for a, b in combinations(ops, 2):
            if self._worth(a, b):
                pair = self.pairs[a, b] = model.new_bool_var("")
                # Both run from the start to the end of the slot.
                model.add(self.start[a] == self.start[b]).only_enforce_if(pair)
                model.add(self.end[a] == self.end[b]).only_enforce_if(pair)
                model.add(self.end[a] - self.start[a] == self._ticks(a.kind, b.kind)).only_enforce_if(pair)
                of_op[a].append(pair)
                of_op[b].append(pair)
                follows[b].append(pair)
        leads = []
        for op in ops:
            alone, leader = model.new_bool_var(""), model.new_bool_var("")
            model.add_exactly_one([alone, *of_op[op]])
            model.add(self.end[op] - self.start[op] == self._ticks(op.kind)).only_enforce_if(alone)
            # The second op of a pair takes no time of its own: the interval of the first is the slot's.
            model.add_exactly_one([leader, *follows[op]])
            size = model.new_int_var(0, self.horizon, "")
            leads.append(model.new_optional_interval_var(self.start[op], size, self.end[op], leader, ""))
        model.add_no_overlap(leads)

    def _worth(self, a: FoldedOp, b: FoldedOp) -> bool:
        """Pairs that save time and can be: neighbours of one leg, and no microbatch with itself."""
        if self._ticks(a.kind, b.kind) >= self._ticks(a.kind) + self._ticks(b.kind):
            return False
        if a.number == b.number and (a.leg == b.leg or not self.pipe.mirrored):
            return False
        return a.leg != b.leg or a.kind != b.kind or abs(a.number - b.number) == 1

    def _memory(self, ops: list[FoldedOp]) -> None:
        """Of one rank: a chunk is held from the start of its F to the end of its W."""
        lives = []
        for op in ops:
            if op.kind == "F":
                length = self.model.new_int_var(0, self.horizon, "")
                last = self.end[op._replace(kind="W")]
                lives.append(self.model.new_interval_var(self.start[op], length, last, ""))
        self.model.add_cumulative(lives, [1] * len(lives), self.pipe.memory)

    def _work(self, ops: list[FoldedOp]) -> None:
        """Redundant, for the bound: from a rank's first start on, the lengths of its slots must fit into the span."""
        lone = sum(self._ticks(op.kind) for op in ops)
        saved = [
            (self._ticks(a.kind) + self._ticks(b.kind) - self._ticks(a.kind, b.kind)) * pair
            for (a, b), pair in self.pairs.items()
            if a.rank == ops[0].rank
        ]
        self.model.add(self.start[ops[0]] + lone - sum(saved) <= self.span)

    def _in_order(self, op: FoldedOp) -> None:
        """Each leg takes its microbatches in order; two that are next to each other may be a pair."""
        if op.number + 1 < self.pipe.share:
            later = op._replace(number=op.number + 1)
            rule = self.model.add(self.start[later] >= self.end[op])
            if (op, later) in self.pairs:
                rule.only_enforce_if(~self.pairs[op, later])

    def _needs(self) -> None:
        """What must have ended (and arrived) before each op, read off a schedule with the same ops."""
        rows = [split(row) for row in one_by_one(self.pipe)]
        schedule = unfold(self.pipe, rows, "one by one")
        for rank in range(self.pipe.ranks):
            for op in schedule.ops(rank):
                for need in schedule.needs(op):
                    lag = int(self.pipe.costs.P2P * TICKS) if schedule.rank_of(need) != rank else 0
                    self.model.add(self.start[self.pipe.folded(op)] >= self.end[self.pipe.folded(need)] + lag)

    def hint(self, rows: list[Row]) -> None:
        """Start from the pairs of a known schedule."""
        schedule = unfold(self.pipe, [split(row) for row in rows], "hint")
        slots = (slot for rank in range(self.pipe.ranks) for slot in schedule.ranks[rank])
        paired = {frozenset(self.pipe.folded(op) for op in slot) for slot in slots}
        for pair, literal in self.pairs.items():
            self.model.add_hint(literal, frozenset(pair) in paired)

    def rows(self, solver: CpSolver) -> list[Row]:
        """The solution: slots in the order of their starts."""
        partner = {a: b for (a, b), pair in self.pairs.items() if solver.value(pair)}
        followers = set(partner.values())
        rows: list[Row] = []
        for rank in range(self.pipe.ranks):
            leaders = [op for op in self.ops if op.rank == rank and op not in followers]
            leaders.sort(key=lambda op: (solver.value(self.start[op]), solver.value(self.end[op])))
            slots = [(op, partner[op]) if op in partner else (op,) for op in leaders]
            rows.append([tuple((op.kind, op.leg) for op in slot) for slot in slots])
        return rows


def _ortools() -> ModuleType:
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ScheduleError(f"exact search needs OR-tools: {lacking(error)}") from error
    return cp_model


def solve(pipe: Pipe, horizon: float, seconds: float, hint: list[Row] | None = None, workers: int = 2) -> Optimum:
    """The shortest schedule of the pipe, or the best within `seconds` and what is proven. `horizon`: a span that is
    surely enough, such as a named schedule's."""
    cp = _ortools()
    constraints = _Constraints(cp, pipe, horizon)
    if hint is not None:
        constraints.hint(hint)
    solver = cp.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = workers
    status = solver.solve(constraints.model)
    bound = solver.best_objective_bound / TICKS
    if status not in (cp.OPTIMAL, cp.FEASIBLE):
        return Optimum(None, float("inf"), bound)
    return Optimum(constraints.rows(solver), solver.value(constraints.span) / TICKS, bound)
