"""All layouts of a number of GPUs, planned: the fastest that fit, and why the others are not among them.

Every layout has a lower bound that costs nothing to compute: its arithmetic spread evenly over all ranks. Layouts are
planned in order of that bound until none of the remaining can be among the best; those are reported as slower, with
their bound. Memory is checked before a step is simulated, and layouts that share a schedule share its program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from dryvine.launch.plan.hardware import GIGA, Machine
from dryvine.launch.plan.memory import RankMemory, state
from dryvine.launch.plan.plan import Plan, fits, make, memory_of, roofline_times
from dryvine.launch.plan.shards import buckets
from dryvine.parallel.schedule.table import SCHEDULES, legal
from dryvine.trainer.config import Config, ConfigError, Tree
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.ramps import BatchConfig
from dryvine.trainer.run_plan import Programs, make_plan

BEST = 10  # the number of best layouts that are found for certain
MICROBATCHES = (1, 2, 4, 8)  # sequences
RECOMPUTE: tuple[tuple[str, ...], ...] = ((), ("norm", "mla_up", "swiglu"))


@dataclass(frozen=True)
class Candidate:
    """A layout and the other values that a sweep varies."""

    pp: int
    dp: int
    ep: int
    schedule: str
    microbatch: int
    recompute: tuple[str, ...]

    def __str__(self) -> str:
        again = ", recompute" if self.recompute else ""
        return f"pp {self.pp} x dp {self.dp} x ep {self.ep}, {self.schedule}, microbatch {self.microbatch}{again}"

    def config(self, base: Config) -> Config:
        """`base` with this layout and the full batch. Raises ValueError if that is not a legal config."""
        tree: Tree = base.model_dump(exclude_none=True)
        changed = {"pp": self.pp, "dp": self.dp, "ep": self.ep, "schedule": self.schedule, "chunks": 1}
        parallel = {**base.parallel.model_dump(), **changed, "microbatch_sequences": self.microbatch}
        model = {**base.model.model_dump(), "recompute": self.recompute}
        return Config.model_validate({**tree, "parallel": parallel, "model": model})


@dataclass(frozen=True)
class SweepRow:
    """The result of a candidate: a plan, or why there is none. `bound`: lower bound of its step, in seconds; `peak`:
    bytes of the fullest rank, 0 where they were not counted."""

    candidate: Candidate
    plan: Plan | None
    bound: float
    reason: str
    peak: int = 0

    @property
    def fits(self) -> bool:
        return self.plan is not None

    @property
    def seconds(self) -> float:
        return self.plan.step_seconds if self.plan else self.bound


def sweep(
    base: Config, gpus: int, machine: Machine, on_progress: Callable[[float], None] = lambda share: None
) -> list[SweepRow]:
    """Every candidate for so many GPUs, best first: those that fit by time, then the others."""
    single = base.model_copy(update={"batch": BatchConfig(sequences=base.batch.sequences)})
    rows = [_first_look(single, candidate, machine) for candidate in candidates(single, gpus)]
    open_rows = sorted((row for row in rows if not row.reason), key=lambda row: row.bound)
    done = [row for row in rows if row.reason]
    best: list[float] = []
    programs = Programs()
    for number, row in enumerate(open_rows):
        on_progress(number / len(open_rows))
        if len(best) == BEST and row.bound >= best[-1]:
            done += [_slower(late, best[0]) for late in open_rows[number:]]
            break
        planned = _planned(single, row, machine, programs)
        done.append(planned)
        if planned.fits:
            best = sorted([*best, planned.seconds])[:BEST]
    return sorted(done, key=lambda row: (not row.fits, row.seconds))


def candidates(base: Config, gpus: int) -> Iterator[Candidate]:
    """All layouts of so many GPUs that the model's blocks and experts allow, whether or not the schedule does."""
    most = len(blocks(base.model))
    for pp in (n for n in range(1, most + 1) if gpus % n == 0):
        for ep in (n for n in range(1, gpus // pp + 1) if gpus // pp % n == 0 and base.model.routed % n == 0):
            for schedule, microbatch, again in product(SCHEDULES, MICROBATCHES, RECOMPUTE):
                if pp > 1 or schedule in ("one_f_one_b", "dualpipev"):  # one rank has no pipeline
                    yield Candidate(pp, gpus // pp // ep, ep, schedule, microbatch, again)


def _first_look(base: Config, candidate: Candidate, machine: Machine) -> SweepRow:
    """The bound, and the reason if the candidate can be rejected without a plan."""
    microbatches, rest = divmod(base.batch.sequences, candidate.microbatch * candidate.dp * candidate.ep)
    if rest or not microbatches:
        each = candidate.microbatch * candidate.dp * candidate.ep
        return SweepRow(
            candidate, None, float("inf"), f"a step of {base.batch.sequences} sequences has no whole number of {each}"
        )
    if problem := legal(candidate.schedule, candidate.pp, microbatches):
        return SweepRow(candidate, None, float("inf"), problem)
    config = candidate.config(base)
    times = roofline_times(config, machine)
    arithmetic = sum(sum(t) for block in blocks(config.model) for t in times[block.kind].values())
    return SweepRow(candidate, None, microbatches * arithmetic / candidate.pp, "")


def _planned(base: Config, row: SweepRow, machine: Machine, programs: Programs) -> SweepRow:
    try:
        run = make_plan(row.candidate.config(base), programs)
    except ConfigError as error:
        return SweepRow(row.candidate, None, float("inf"), str(error))
    least = max(sum(state(run, mine).values()) for mine in buckets(run))
    if least > machine.usable_bytes:
        reason = f"does not fit: weights, sums and optimizer alone {least / GIGA:.0f} GB"
        return SweepRow(row.candidate, None, row.bound, reason)
    ranks = memory_of(run, machine)
    if not fits(ranks, machine):
        return SweepRow(row.candidate, None, row.bound, _too_large(ranks, machine), max(rank.total for rank in ranks))
    plan = make(run, machine)
    return SweepRow(row.candidate, plan, row.bound, "", plan.fullest.total)


def _too_large(ranks: Sequence[RankMemory], machine: Machine) -> str:
    fullest = max(ranks, key=lambda rank: rank.total)
    if fullest.total <= machine.usable_bytes:
        on_host = max(rank.on_host for rank in ranks)
        return f"does not fit: {on_host / GIGA:.0f} GB of host memory for each GPU, of {machine.host.memory_gb:.0f}"
    kinds = sorted(fullest.kinds.items(), key=lambda item: -item[1])[:2]
    most = ", ".join(f"{kind} {size / GIGA:.0f}" for kind, size in kinds)
    return f"does not fit: {fullest.total / GIGA:.0f} GB on pipeline rank {fullest.rank} ({most})"


def _slower(row: SweepRow, best: float) -> SweepRow:
    return SweepRow(
        row.candidate,
        None,
        row.bound,
        f"slower: at least {row.bound:.3g} s for its arithmetic alone; best {best:.3g} s",
    )
