"""All layouts of a number of GPUs, planned: the fastest that fit, and why the others are not among them.

Memory comes first, and needs no simulation. What fits has a lower bound of its step: a rank runs its slots one after
the other, and the first of them waits for the forwards of the stages before. Slots are counted once for layouts with
the same schedule, so a bound costs a few products. Layouts are simulated in the order of their bounds until none of the
remaining can be among the best; those are reported as slower, with their bound.

Offload of the optimizer costs time whatever the layout, so it is tried where a layout does not fit without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from dryvine.comm.config import CommConfig
from dryvine.launch.plan.hardware import GIGA, Machine
from dryvine.launch.plan.memory import MASTERS, MOMENTS, Parts, RankMemory, state
from dryvine.launch.plan.plan import Plan, fits, make, memory_of, prices_of, roofline_times
from dryvine.launch.plan.sharding import update_seconds
from dryvine.launch.plan.shards import BucketSize, buckets
from dryvine.launch.plan.times import StagePrices
from dryvine.parallel.schedule.footprint import Footprint
from dryvine.parallel.schedule.table import SCHEDULES, legal
from dryvine.trainer.activations import FlightSizes, flight_sizes, microbatch_size
from dryvine.trainer.config import Config, ConfigError, Tree
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.ramps import BatchConfig
from dryvine.trainer.run_plan import LayoutPlan, LayoutPlans
from dryvine.trainer.stream_memory import Running, running_bytes

BEST = 10  # the number of best layouts that are found for certain
MEMORY_SHARE = 0.7  # of a sweep's time: about what memory and bounds take
ROUNDING = 1 - 1e-9  # sums in another order
MICROBATCHES = (1, 2, 4, 8)  # sequences
OUTPUTS = ("norm", "mla_up", "swiglu")
RECOMPUTE: tuple[tuple[str, ...], ...] = ((), OUTPUTS)


@dataclass(frozen=True)
class Candidate:
    """A layout and the other values that a sweep varies."""

    pp: int
    dp: int
    ep: int
    schedule: str
    microbatch: int
    recompute: tuple[str, ...]
    offload: bool = False

    def __str__(self) -> str:
        again = f", recompute {', '.join(self.recompute)}" if self.recompute else ""
        off = ", optimizer in host memory" if self.offload else ""
        return f"pp {self.pp} x dp {self.dp} x ep {self.ep}, {self.schedule}, microbatch {self.microbatch}{again}{off}"

    def config(self, base: Config) -> Config:
        """`base` with this layout and the full batch. Raises ValueError if that is not a legal config."""
        tree: Tree = base.model_dump(exclude_none=True)
        changed = {"pp": self.pp, "dp": self.dp, "ep": self.ep, "schedule": self.schedule, "chunks": 1}
        parallel = {**base.parallel.model_dump(), **changed, "microbatch_sequences": self.microbatch}
        model = {**base.model.model_dump(), "recompute": self.recompute}
        optim = {**base.optim.model_dump(), "offload": "cpu" if self.offload else "none"}
        return Config.model_validate({**tree, "parallel": parallel, "model": model, "optim": optim})


@dataclass(frozen=True)
class SweepRow:
    """The result of a candidate: a plan, or why there is none. `bound`: lower bound of its step, in seconds; `peak`:
    bytes of the fullest rank, 0 where they were not counted; `least`: those that it holds between steps, and `spared`:
    the most that offload takes from a rank, 0 if they were not either."""

    candidate: Candidate
    plan: Plan | None
    bound: float
    reason: str
    peak: int = 0
    least: int = 0
    spared: int = 0

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
    single = base.model_copy(update={"batch": BatchConfig(sequences=base.batch.sequences), "comm": _comm(base, gpus)})
    rows = [_first_look(single, candidate, machine) for candidate in candidates(single, gpus)]
    done, open_rows = [row for row in rows if row.reason], [row for row in rows if not row.reason]
    bench, fitting = _Bench(single, machine), list[SweepRow]()
    for number, row in enumerate(open_rows):
        on_progress(MEMORY_SHARE * number / len(open_rows))
        judged = bench.judge(row)
        (done if judged.reason else fitting).append(judged)
    fitting.sort(key=lambda row: row.bound)
    best: list[float] = []
    for number, row in enumerate(fitting):
        on_progress(MEMORY_SHARE + (1 - MEMORY_SHARE) * number / len(fitting))
        if len(best) == BEST and row.bound >= best[-1]:
            done += [_slower(late, best[0]) for late in fitting[number:]]
            break
        planned = bench.simulate(row)
        done.append(planned)
        if planned.fits:
            best = sorted([*best, planned.seconds])[:BEST]
    return sorted(done, key=lambda row: (not row.fits, row.seconds))


def _comm(base: Config, gpus: int) -> CommConfig:
    """Without the nodes of another number of GPUs."""
    comm = base.comm
    if sum(comm.topology.nodes) == gpus:
        return comm
    return comm.model_copy(update={"topology": comm.topology.model_copy(update={"nodes": ()})})


def candidates(base: Config, gpus: int) -> Iterator[Candidate]:
    """All layouts of so many GPUs that the model's blocks and experts allow, whether or not the schedule does."""
    most = len(blocks(base.model))
    ways = (*RECOMPUTE, (*OUTPUTS, "transposes")) if base.fp8.fp8 else RECOMPUTE
    for pp in (n for n in range(1, most + 1) if gpus % n == 0):
        for ep in (n for n in range(1, gpus // pp + 1) if gpus // pp % n == 0 and base.model.routed % n == 0):
            for schedule, microbatch, again in product(SCHEDULES, MICROBATCHES, ways):
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


class _Bench:
    """What layouts of one sweep are judged with: what they share is made once."""

    def __init__(self, base: Config, machine: Machine) -> None:
        self.base, self.machine = base, machine
        self._layouts = LayoutPlans()
        self._buckets: dict[tuple[object, ...], list[list[BucketSize]]] = {}
        self._flights: dict[tuple[object, ...], tuple[FlightSizes, Running]] = {}

    def judge(self, row: SweepRow) -> SweepRow:
        """The row with the layout's peak, and why it is out or a bound of its step from its slots; with offload if it
        fits only so."""
        judged = self._judge(row)
        offloaded_peak = max(judged.peak, judged.least) - judged.spared
        if self.machine.cuda and judged.reason and 0 < offloaded_peak <= self.machine.usable_bytes:
            offloaded = self._judge(replace(row, candidate=replace(row.candidate, offload=True)))
            return judged if offloaded.reason else offloaded
        return judged

    def _judge(self, row: SweepRow) -> SweepRow:
        """The same, with the optimizer where the candidate has it."""
        try:
            layout = self._layouts.of(row.candidate.config(self.base))
        except ConfigError as error:
            return replace(row, bound=float("inf"), reason=str(error))
        every, machine = self._buckets_of(layout), self.machine
        kept = [state(layout, mine) for mine in every]
        spared = max(kinds.get(MASTERS, 0) + kinds.get(MOMENTS, 0) for kinds in kept)
        row = replace(row, least=max(sum(kinds.values()) for kinds in kept), spared=spared)
        if row.least > machine.usable_bytes:
            alone = f"does not fit: weights, sums and optimizer alone {row.least / GIGA:.0f} GB"
            return replace(row, reason=alone)
        ranks = memory_of(layout, Parts(every, *self._flights_of(layout)), machine)
        row = replace(row, peak=max(rank.total for rank in ranks))
        if not fits(ranks, machine):
            return replace(row, reason=_too_large(ranks, machine))
        update = update_seconds(layout.config, every, machine, None)
        span = least_span(layout.footprint, prices_of(layout, machine))
        return replace(row, bound=ROUNDING * (span + update))

    def simulate(self, row: SweepRow) -> SweepRow:
        """The row with its plan, or why it is out after all: of host memory the buffer of checkpoints comes last."""
        plan = make(self._layouts.of(row.candidate.config(self.base)), self.machine)
        return replace(row, plan=plan) if plan.fits else replace(row, reason=_too_large(plan.ranks, self.machine))

    def _buckets_of(self, layout: LayoutPlan) -> list[list[BucketSize]]:
        """They follow from which rank has which stages, and over how many ranks these are spread."""
        p = layout.config.parallel
        key = layout.schedule.routes, p.dp, p.ep
        if key not in self._buckets:
            self._buckets[key] = buckets(layout)
        return self._buckets[key]

    def _flights_of(self, layout: LayoutPlan) -> tuple[FlightSizes, Running]:
        size = microbatch_size(layout.config, self.machine.cuda)
        key = layout.blocks, size, layout.config.model.recompute
        if key not in self._flights:
            cuda = self.machine.cuda
            self._flights[key] = flight_sizes(layout, cuda), running_bytes(layout, cuda)
        return self._flights[key]


def least_span(footprint: Footprint, prices: StagePrices) -> float:
    """Seconds that a step takes at least: a rank has its slots to run, and the first of them waits for the forwards of
    the stages before."""
    seconds = {slot: prices.slot(slot) for slots in footprint.slots for slot, _ in slots}
    forward: dict[int, float] = {}  # the shortest slot with a forward of the stage
    for slot, each in seconds.items():
        forward |= {op.stage: min(each, forward.get(op.stage, each)) for op in slot if op.kind == "F"}
    return max(
        sum(forward[stage] for stage in range(slots[0].slot[0].stage))
        + sum(seconds[slot] * times for slot, times in slots)
        for slots in footprint.slots
    )


def _too_large(ranks: Sequence[RankMemory], machine: Machine) -> str:
    fullest = max(ranks, key=lambda rank: rank.total)
    if fullest.total <= machine.usable_bytes:
        on_host = max(rank.on_host for rank in ranks)
        return f"does not fit: {on_host / GIGA:.0f} GB of host memory for each GPU, of {machine.host.memory_gb:.0f}"
    kinds = sorted(fullest.kinds.items(), key=lambda item: -item[1])[:2]
    most = ", ".join(f"{kind} {size / GIGA:.0f}" for kind, size in kinds)
    return f"does not fit: {fullest.total / GIGA:.0f} GB on pipeline rank {fullest.rank} ({most})"


def _slower(row: SweepRow, best: float) -> SweepRow:
    return replace(row, reason=f"slower: at least {row.bound:.3g} s, with no wait in the middle; best {best:.3g} s")
