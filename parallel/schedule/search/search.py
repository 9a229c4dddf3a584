"""A schedule better than every named one, for given costs and a memory limit; and how much better any could be.

The search is annealing over folded rows (`search_fold`, `search_moves`, `search_anneal`), in rounds that each start
from the best so far, of a short pipe that is then made longer (`search_grow`); `search_exact` may improve or prove
small ones. What it gives is an ordinary Schedule: to be checked, drawn, saved as CSV and run as `file:`. It is never
worse than the best named schedule under the same limit, because that is what it falls back to.

One measure for all: costs are those of a P-th of the model, and memory is counted in its activations. A V's stages are
half as large, so its costs and its chunks count half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dryvine.parallel.schedule.check import check
from dryvine.parallel.schedule.costs import KINDS, Costs
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.rules import ScheduleError, Sizes
from dryvine.parallel.schedule.search.anneal import State, anneal
from dryvine.parallel.schedule.search.exact import solve
from dryvine.parallel.schedule.search.fold import Pipe, Row, fold, one_by_one, split, tidy, unfold
from dryvine.parallel.schedule.search.grow import grow
from dryvine.parallel.schedule.simulate import Timeline, simulate
from dryvine.parallel.schedule.table import SCHEDULES


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


def search(
    pp: int,
    microbatches: int,
    costs: Costs,
    memory: int | None = None,
    copies: int = 2,
    steps: int = 200_000,
    rounds: int = 2,
    seed: int = 0,
    exact_seconds: float = 0.0,
) -> Found:
    """The best schedule that `steps` of annealing find; deterministic, but for `exact_seconds` of CP-SAT after it.

    `memory`: live chunks (a P-th of the model, one microbatch) a rank may hold, DualPipe's P+1 if not given; `copies`
    of the weights: with 2 it looks for a DualPipe-like schedule if pp and microbatches are even, else for a V. Raises
    ScheduleError if the limit is below what any schedule needs.
    """
    memory = pp + 1 if memory is None else memory
    mirrored = copies == 2 and pp % 2 == 0 and microbatches % 2 == 0
    part = Sizes(pp // 2, microbatches // 2, 2) if mirrored else Sizes(pp, microbatches, 2)
    own = costs if mirrored else costs.of_a_part(0.5)
    pipe = Pipe(part.pp, part.microbatches, memory if mirrored else 2 * memory, own, mirrored)
    rows = _anneal(pipe, steps, rounds, seed)
    if rows is None:
        raise ScheduleError(f"no schedule holds as few as {memory} chunks; set the memory to 2 or more")
    bound = lower_bound(pipe)
    if exact_seconds:
        best = solve(pipe, State(pipe, rows).span, exact_seconds, rows)
        bound = max(bound, best.bound)
        if best.rows and State(pipe, best.rows).span < State(pipe, rows).span:
            rows = best.rows
    found = simulate(unfold(pipe, [tidy(pipe, row) for row in rows], "search"), own)
    check(found.schedule)
    named = min(_named(pp, microbatches, costs, memory, copies), key=lambda t: t.span, default=None)
    return Found(named if named and named.span <= found.span else found, named, bound)


def _anneal(pipe: Pipe, steps: int, rounds: int, seed: int) -> list[Row] | None:
    """Rounds of annealing, each from the best so far. A long pipe is searched short first, then made longer, if
    that can be done without new bubbles."""
    best = min(_starts(pipe), key=lambda rows: State(pipe, rows).score, default=None)
    if best is None:
        return None
    short = replace(pipe, share=2 * pipe.ranks)
    if short.share < pipe.share:
        core = _anneal(short, steps - steps // 4, rounds, seed)
        longer = core and grow(short, core, pipe)
        if longer and State(pipe, longer).score < State(pipe, best).score:
            best, steps, rounds = longer, steps // 4, 1
    for i in range(rounds):
        best = anneal(pipe, best, steps // rounds, seed + i)
    return best


def in_one_measure(schedule: Schedule, costs: Costs) -> Timeline:
    """Its timeline where `costs` are those of a P-th of the model, however many stages it is cut into."""
    return simulate(schedule, costs.of_a_part(len(schedule.ranks) / schedule.stages))


def _named(pp: int, microbatches: int, costs: Costs, memory: int, copies: int) -> Iterator[Timeline]:
    for name, generator in SCHEDULES.items():
        sizes = Sizes(pp, microbatches, generator.chunks)
        if generator.explain(name, sizes) is None:
            timeline = in_one_measure(generator.make(sizes), costs)
            held = timeline.peak_activations * pp / timeline.schedule.stages
            if held <= memory and len(timeline.schedule.routes) <= copies:
                yield timeline


def _starts(pipe: Pipe) -> Iterator[list[Row]]:
    """Rows that fit into the memory: the Vs that have names, as they are and with every B split, so that no rank waits
    for weight gradients; and one microbatch after another."""
    sizes = Sizes(pipe.ranks, pipe.share, 2)
    named = [fold(g.make(sizes)) for g in (SCHEDULES["dualpipev"], SCHEDULES["zbv"]) if g.allows(sizes)]
    for rows in (*named, *([split(row) for row in rows] for rows in named), one_by_one(pipe)):
        try:
            State(pipe, rows)
        except ValueError:
            continue
        yield rows


def lower_bound(pipe: Pipe) -> float:
    """A span that no schedule of this pipe can undercut.

    A rank's first backward cannot start before the first microbatch has been through all stages and back to it. Until
    then the rank can only run forwards, as many as its memory holds; the rest of its work comes after, and however it
    is paired, an op takes at least its arithmetic.
    """
    work = _least_work(pipe)
    total = 2 * pipe.share * (work["F"] + work["I"] + work["W"])
    forward, backward, hop = _least_time(pipe, "F"), _least_time(pipe, "I"), pipe.costs.P2P
    turn = hop if pipe.mirrored else 0.0
    bounds = [2 * pipe.ranks * (forward + backward) + work["W"]]
    for rank in range(pipe.ranks):
        head = rank * (forward + hop)
        back = 2 * pipe.ranks * forward + (2 * pipe.ranks - 2) * hop + turn + rank * (backward + hop)
        early = min(min(pipe.memory, 2 * pipe.share) * work["F"], back - head)
        bounds.append(back + total - early)
    return max(bounds)


def _least_time(pipe: Pipe, kind: str) -> float:
    """The shortest slot with an op of this kind (B is no shorter than I)."""
    return min(price for slot, price in pipe.prices.items() if any(letter[0] == kind for letter in slot))


def _least_work(pipe: Pipe) -> dict[str, float]:
    """What each kind adds to its rank's time at least: its arithmetic, less if a given pair price is below the sum."""
    costs = pipe.costs
    arithmetic = {kind: sum(p.time for p in costs.phases(kind) if p.lane == "compute") for kind in KINDS}
    shares = [costs.pair(a, b) / (arithmetic[a] + arithmetic[b]) for a in KINDS for b in KINDS]
    return {kind: arithmetic[kind] * min(1.0, *shares) for kind in KINDS}
