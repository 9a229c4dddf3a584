"""A schedule better than every named one, for given costs and a memory limit; and how much better any could be.

The search is annealing over folded rows (`fold`, `moves`, `anneal`), in rounds that each start from the best so far, of
a short pipe that is then made longer (`grow`); `exact` may improve or prove small ones. Its result is an ordinary
Schedule: to be checked, drawn, saved as CSV and run as `file:`. It is never worse than the best named schedule under
the same limit, because that is what it falls back to.

One measure for all: costs are those of a P-th of the model, and memory is counted in its activations. A V's stages are
half as large, so its costs and its chunks count half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dryvine.parallel.schedule.check import check
from dryvine.parallel.schedule.costs import Costs
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.rules import ScheduleError, Sizes
from dryvine.parallel.schedule.search.anneal import TimedRows, anneal
from dryvine.parallel.schedule.search.bound import lower_bound
from dryvine.parallel.schedule.search.exact import solve
from dryvine.parallel.schedule.search.fold import Pipe, Row, fold, one_by_one, split, tidy, unfold
from dryvine.parallel.schedule.search.grow import grow
from dryvine.parallel.schedule.simulate import Timeline, simulate
from dryvine.parallel.schedule.table import SCHEDULES


@dataclass(frozen=True)
class Problem:
    """What a schedule is searched for.

    `memory`: live chunks (a P-th of the model, one microbatch) a rank may hold, DualPipe's P+1 if None; `copies` of the
    weights: with 2 the search is for a DualPipe-like schedule if pp and microbatches are even, else for a V.
    """

    pp: int
    microbatches: int
    costs: Costs
    memory: int | None = None
    copies: int = 2

    @property
    def chunks(self) -> int:
        return self.pp + 1 if self.memory is None else self.memory

    @property
    def pipe(self) -> Pipe:
        """The folded pipe to search in."""
        if self.copies == 2 and self.pp % 2 == 0 and self.microbatches % 2 == 0:
            return Pipe(self.pp // 2, self.microbatches // 2, self.chunks, self.costs, mirrored=True)
        return Pipe(self.pp, self.microbatches, 2 * self.chunks, self.costs.of_a_part(0.5), mirrored=False)


@dataclass(frozen=True)
class Effort:
    """`steps` of annealing, spread over `rounds`; then `exact_seconds` of CP-SAT, without which the result is always
    the same."""

    steps: int = 200_000
    rounds: int = 2
    seed: int = 0
    exact_seconds: float = 0.0


@dataclass(frozen=True)
class Found:
    """`named`: the best named schedule within the limit, None if there is none. `bound`: no schedule of the searched
    layout is shorter. Spans are of the same model throughout."""

    timeline: Timeline
    named: Timeline | None
    bound: float

    @property
    def gain(self) -> float:
        """The part of the named schedule's span that is saved."""
        return 1 - self.timeline.span / self.named.span if self.named else 0.0


def search(problem: Problem, effort: Effort) -> Found:
    """The best schedule that the effort finds. Raises ScheduleError if the limit is below what any schedule needs."""
    pipe = problem.pipe
    rows = _anneal(pipe, effort.steps, effort.rounds, effort.seed)
    if rows is None:
        raise ScheduleError(f"no schedule holds as few as {problem.chunks} chunks; set the memory to 2 or more")
    bound = lower_bound(pipe)
    if effort.exact_seconds:
        span = TimedRows(pipe, rows).span
        optimum = solve(pipe, span, effort.exact_seconds, rows)
        bound = max(bound, optimum.bound)
        if optimum.rows and TimedRows(pipe, optimum.rows).span < span:
            rows = optimum.rows
    timeline = simulate(unfold(pipe, [tidy(pipe, row) for row in rows], "search"), pipe.costs)
    check(timeline.schedule)
    named = min(_named(problem), key=lambda named: named.span, default=None)
    return Found(named if named and named.span <= timeline.span else timeline, named, bound)


def in_one_measure(schedule: Schedule, costs: Costs) -> Timeline:
    """Its timeline where `costs` are those of a P-th of the model, however many stages it is cut into."""
    return simulate(schedule, costs.of_a_part(len(schedule.ranks) / schedule.stages))


def _named(problem: Problem) -> Iterator[Timeline]:
    """The named schedules that are legal and keep to the limit."""
    for name, generator in SCHEDULES.items():
        sizes = Sizes(problem.pp, problem.microbatches, generator.chunks)
        if generator.explain(name, sizes) is None:
            timeline = in_one_measure(generator.make(sizes), problem.costs)
            held = timeline.peak_activations * problem.pp / timeline.schedule.stages
            if held <= problem.chunks and len(timeline.schedule.routes) <= problem.copies:
                yield timeline


def _anneal(pipe: Pipe, steps: int, rounds: int, seed: int) -> list[Row] | None:
    """Rounds of annealing, each from the best so far. None if no rows fit into the memory to start from."""
    best = min(_starts(pipe), key=lambda rows: TimedRows(pipe, rows).score, default=None)
    if best is None:
        return None
    # A long pipe is searched short first, with most of the steps, and made longer if that adds no bubble.
    short = replace(pipe, share=2 * pipe.ranks)
    if short.share < pipe.share:
        core = _anneal(short, steps - steps // 4, rounds, seed)
        longer = core and grow(short, core, pipe)
        if longer and TimedRows(pipe, longer).score < TimedRows(pipe, best).score:
            best, steps, rounds = longer, steps // 4, 1
    for i in range(rounds):
        best = anneal(pipe, best, steps // rounds, seed + i)
    return best


def _starts(pipe: Pipe) -> Iterator[list[Row]]:
    """Rows that fit into the memory: the Vs that have names, as they are and with every B split, so that no rank waits
    for weight gradients; and one microbatch after another."""
    sizes = Sizes(pipe.ranks, pipe.share, 2)
    named = [fold(g.make(sizes)) for g in (SCHEDULES["dualpipev"], SCHEDULES["zbv"]) if g.allows(sizes)]
    for rows in (*named, *([split(row) for row in rows] for rows in named), one_by_one(pipe)):
        try:
            TimedRows(pipe, rows)
        except ValueError:
            continue
        yield rows
