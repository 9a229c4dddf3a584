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
from typing import Any, NamedTuple

from dryvine.parallel.schedule.ir import Kind
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.search.fold import Pipe, Row

GRAIN = 240  # integer ticks per unit of time
SPLIT: tuple[Kind, ...] = ("F", "I", "W")


class Item(NamedTuple):
    rank: int
    kind: Kind
    turn: int
    number: int


@dataclass(frozen=True)
class Optimum:
    """`rows`, None if none was found in time, and `bound`: no schedule of this pipe has a shorter span."""

    rows: list[Row] | None
    span: float
    bound: float

    @property
    def proven(self) -> bool:
        return self.rows is not None and self.span <= self.bound * (1 + 1e-3)


class _Model:
    def __init__(self, pipe: Pipe, horizon: float) -> None:
        self.cp = _ortools()
        self.pipe, self.model = pipe, self.cp.CpModel()
        self.horizon = int(horizon * GRAIN) + 1
        numbers, turns = range(pipe.share), (0, 1)
        self.items = [Item(r, k, t, i) for r in range(pipe.ranks) for k in SPLIT for t in turns for i in numbers]
        self.start = {item: self._time() for item in self.items}
        self.end = {item: self._time() for item in self.items}
        self.pairs: dict[tuple[Item, Item], Any] = {}
        self.span = self._time()
        for rank in range(pipe.ranks):
            self._rank([item for item in self.items if item.rank == rank])
        for item in self.items:
            self._order(item)
            self.model.add(self.span >= self.end[item])
        self.model.minimize(self.span)

    def _time(self) -> Any:
        return self.model.new_int_var(0, self.horizon, "")

    def _ticks(self, *kinds: Kind) -> int:
        """Rounded down, so that the bound stays one; the true span is taken from the rows."""
        letters = tuple((kind, 0) for kind in kinds)
        return int(self.pipe.prices[letters] * GRAIN + 1e-6)

    def _rank(self, items: list[Item]) -> None:
        model, mine = self.model, defaultdict(list)
        follows = defaultdict(list)
        for a, b in combinations(items, 2):
            if self._worth(a, b):
                pair = self.pairs[a, b] = model.new_bool_var("")
                model.add(self.start[a] == self.start[b]).only_enforce_if(pair)
                model.add(self.end[a] == self.end[b]).only_enforce_if(pair)
                model.add(self.end[a] - self.start[a] == self._ticks(a.kind, b.kind)).only_enforce_if(pair)
                mine[a].append(pair)
                mine[b].append(pair)
                follows[b].append(pair)
        leads = []
        for item in items:
            alone, leader = model.new_bool_var(""), model.new_bool_var("")
            model.add_exactly_one([alone, *mine[item]])
            model.add(self.end[item] - self.start[item] == self._ticks(item.kind)).only_enforce_if(alone)
            model.add_exactly_one([leader, *follows[item]])
            size = model.new_int_var(0, self.horizon, "")
            leads.append(model.new_optional_interval_var(self.start[item], size, self.end[item], leader, ""))
        model.add_no_overlap(leads)
        self._memory(items)
        self._work(items)

    def _worth(self, a: Item, b: Item) -> bool:
        """Pairs that save time and can be: neighbours of one turn, and no microbatch with itself."""
        if self._ticks(a.kind, b.kind) >= self._ticks(a.kind) + self._ticks(b.kind):
            return False
        if a.number == b.number and (a.turn == b.turn or not self.pipe.mirrored):
            return False
        return a.turn != b.turn or a.kind != b.kind or abs(a.number - b.number) == 1

    def _memory(self, items: list[Item]) -> None:
        lives = []
        for item in items:
            if item.kind == "F":
                length = self.model.new_int_var(0, self.horizon, "")
                last = self.end[item._replace(kind="W")]
                lives.append(self.model.new_interval_var(self.start[item], length, last, ""))
        self.model.add_cumulative(lives, [1] * len(lives), self.pipe.memory)

    def _work(self, items: list[Item]) -> None:
        """Redundant, for the bound: from a rank's first start on, the lengths of its slots must fit into the span."""
        lone = sum(self._ticks(item.kind) for item in items)
        saved = [
            (self._ticks(a.kind) + self._ticks(b.kind) - self._ticks(a.kind, b.kind)) * pair
            for (a, b), pair in self.pairs.items()
            if a.rank == items[0].rank
        ]
        self.model.add(self.start[items[0]] + lone - sum(saved) <= self.span)

    def _order(self, item: Item) -> None:
        """What must have ended, and the lag; each turn takes its microbatches in order."""
        rank, kind = item.rank, item.kind
        if item.number + 1 < self.pipe.share:
            later = item._replace(number=item.number + 1)
            pair = self.pairs.get((item, later))
            rule = self.model.add(self.start[later] >= self.end[item])
            if pair is not None:
                rule.only_enforce_if(~pair)
        if kind == "W":
            self._after(item._replace(kind="I"), item, 0)
            return
        if kind == "I":
            self._after(item._replace(kind="F"), item, 0)
        source = self._source(item)
        if source is not None:
            at_fold = source.rank == rank and not self.pipe.mirrored
            self._after(source, item, 0 if at_fold else int(self.pipe.costs.P2P * GRAIN))

    def _after(self, first: Item, then: Item, lag: int) -> None:
        self.model.add(self.start[then] >= self.end[first] + lag)

    def _source(self, item: Item) -> Item | None:
        """The op on the neighbouring rank that it waits for."""
        before = item.rank + (1 if item.turn != (item.kind == "I") else -1)
        if before < 0:
            return None
        if before == self.pipe.ranks:
            return item._replace(turn=1 - item.turn)
        return item._replace(rank=before)

    def hint(self, rows: list[Row]) -> None:
        """Start from the pairs of a known schedule."""
        count: dict[tuple[int, Kind, int], int] = defaultdict(int)
        paired = set()
        for rank, row in enumerate(rows):
            for slot in row:
                found = []
                for kind, turn in slot:
                    if kind in SPLIT:
                        found.append(Item(rank, kind, turn, count[rank, kind, turn]))
                        count[rank, kind, turn] += 1
                paired.add(frozenset(found))
        for pair, literal in self.pairs.items():
            self.model.add_hint(literal, frozenset(pair) in paired)

    def rows(self, solver: Any) -> list[Row]:
        partner = {a: b for (a, b), pair in self.pairs.items() if solver.value(pair)}
        followers = set(partner.values())
        rows: list[Row] = []
        for rank in range(self.pipe.ranks):
            leaders = [item for item in self.items if item.rank == rank and item not in followers]
            leaders.sort(key=lambda item: (solver.value(self.start[item]), solver.value(self.end[item])))
            slots = [(item, partner[item]) if item in partner else (item,) for item in leaders]
            rows.append([tuple((item.kind, item.turn) for item in slot) for slot in slots])
        return rows


def _ortools() -> Any:
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ScheduleError("exact search needs OR-tools; pip install 'dryvine[search]'") from error
    return cp_model


def solve(pipe: Pipe, horizon: float, seconds: float, hint: list[Row] | None = None, workers: int = 2) -> Optimum:
    """The shortest schedule of the pipe, or the best within `seconds` and what is proven. `horizon`: a span that is
    surely enough, such as a named schedule's."""
    model = _Model(pipe, horizon)
    if hint is not None:
        model.hint(hint)
    solver = model.cp.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = workers
    status = solver.solve(model.model)
    bound = solver.best_objective_bound / GRAIN
    if status not in (model.cp.OPTIMAL, model.cp.FEASIBLE):
        return Optimum(None, float("inf"), bound)
    return Optimum(model.rows(solver), solver.value(model.span) / GRAIN, bound)
