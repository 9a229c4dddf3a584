"""The cost of a run from its config and a machine: memory, bytes, seconds, money.

The simulated schedule is the one that would run. What the model of a step leaves out (waiting for slower ranks,
checkpoints, validation, restarts) is not hidden in an efficiency factor; docs/planning.md shows the error of each line
against measured steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import NamedTuple

from dryvine.comm.integers import ceil_div
from dryvine.launch.plan import traffic
from dryvine.launch.plan.copies import with_copies, with_saves
from dryvine.launch.plan.hardware import GIGA, TERA, Machine
from dryvine.launch.plan.memory import Parts, RankMemory, memory, parts_of
from dryvine.launch.plan.profiled import Profile
from dryvine.launch.plan.sharding import Sharding, shard
from dryvine.launch.plan.times import PhaseTimes, StagePrices, roofline
from dryvine.launch.plan.traffic import Dispatching, LinkBytes, topology_of
from dryvine.launch.plan.work import tasks
from dryvine.parallel.schedule.simulate import Timeline, simulate
from dryvine.trainer.activations import DTYPE_BYTES, microbatch_size
from dryvine.trainer.config import Config
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.run_plan import LayoutPlan

MAIN_KINDS = ("embed", "dense", "moe", "head")  # MFU counts the main model, as DeepSeek does
DAY = 86400.0
HOUR = 3600.0


class SlotTimes(NamedTuple):
    """One kind of slot in a step; means over pipeline ranks."""

    slots: float
    seconds: float  # of all of them

    @property
    def each(self) -> float:
        return self.seconds / self.slots


@dataclass(frozen=True)
class Plan:
    """All results of a plan; texts and pages only format it. Seconds are those of a step with the full batch."""

    run: LayoutPlan
    machine: Machine
    sent: Dispatching
    ranks: list[RankMemory]
    times: dict[str, PhaseTimes]  # seconds of the phases of every kind of block
    prices: StagePrices
    timeline: Timeline  # seconds
    sharding: Sharding  # sums of gradients, the update, new weights to all copies
    source: str  # of the times of phases

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def world(self) -> int:
        return self.config.parallel.world

    # -- a step

    @property
    def optimizer_seconds(self) -> float:
        """The part of sums, update and gathers that neither the pipeline's tail nor the next forwards hide."""
        sharding = self.sharding
        return sharding.sums.exposed + sharding.update_seconds + sharding.gathers.exposed

    @property
    def step_seconds(self) -> float:
        return self.timeline.span + self.optimizer_seconds

    @property
    def tokens(self) -> int:
        """Of a full step."""
        return self.config.batch.sequences * self.config.data.seq_len

    @property
    def bubble_seconds(self) -> float:
        """Time in which a rank has nothing to run, mean over pipeline ranks."""
        return mean(self.timeline.idle(rank) for rank in range(len(self.timeline.cells)))

    @property
    def exposed_seconds(self) -> float:
        """Time in which an all-to-all runs and no arithmetic does, mean over pipeline ranks."""
        return mean(sum(self.prices.exposed(cell.slot) for cell in row) for row in self.timeline.cells)

    @property
    def overlapped_share(self) -> float:
        """Forwards in an overlapped pair, of all forwards."""
        return self.timeline.overlapped_share if self.prices.overlap else 0.0

    @cached_property
    def by_kind(self) -> dict[str, SlotTimes]:
        """Slots by their ops ("BF": pairs)."""
        ranks, times = len(self.timeline.cells), self.timeline.times_by_kind
        return {kinds: SlotTimes(len(some) / ranks, sum(some) / ranks) for kinds, some in times.items()}

    # -- a run

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def tokens_per_day(self) -> float:
        return DAY * self.tokens_per_second

    @cached_property
    def token_budget(self) -> int:
        """Tokens of all steps of the run."""
        return round(sum(tokens for _, tokens in budget(self.config)))

    @cached_property
    def run_seconds(self) -> float:
        """Seconds of all steps. The smaller batches of a ramp have the same bubble and optimizer time for fewer
        tokens."""
        full = self.config.batch.sequences
        least = min(self.config.batch.sizes())
        per_sequence = (self.timeline.span - self._seconds_of(least)) / (full - least) if least < full else 0.0
        return sum(
            tokens / (sequences * self.config.data.seq_len) * (self.step_seconds - (full - sequences) * per_sequence)
            for sequences, tokens in budget(self.config)
        )

    def _seconds_of(self, sequences: int) -> float:
        return simulate(self.run.footprints[sequences].schedule, self.prices).span

    @property
    def gpu_hours(self) -> float:
        return self.run_seconds * self.world / HOUR

    @property
    def dollars(self) -> float:
        return self.gpu_hours * self.machine.dollars

    # -- use of the machine

    @property
    def flop_per_token(self) -> tuple[float, float]:
        """FLOP of the main model, forward and backward: without the masked half of attention, and with it."""
        c = self.config
        causal = sum(b.cost for b in blocks(c.model, c.data.seq_len) if b.kind in MAIN_KINDS)
        masked = c.model.layers * c.model.heads * (c.model.qk_dim + c.model.v_dim) * c.data.seq_len
        return 3 * causal, 3 * (causal + masked)

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOP utilisation of the dense BF16 peak: causal, and not."""
        rate = self.tokens_per_second / self.world / (self.machine.peak_bf16 * TERA)
        causal, whole = self.flop_per_token
        return causal * rate, whole * rate

    @property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool:
        return fits(self.ranks, self.machine)

    @property
    def dispatch_bytes(self) -> LinkBytes:
        """Bytes of a step's all-to-alls by link class, for the rank that sends most."""
        return max(map(self.dispatch_bytes_of, range(self.config.parallel.pp)), key=lambda sent: sum(sent.values()))

    def dispatch_bytes_of(self, pp_rank: int) -> LinkBytes:
        layers = self._moe_forwards(pp_rank)
        return Counter({link: size * layers for link, size in self.sent.all.items()})

    def _moe_forwards(self, rank: int) -> int:
        """How often the microbatches of a rank pass a MoE layer in a step."""
        kinds = {block.name: block.kind for block in blocks(self.config.model)}
        moe = {
            s: len([n for n in names if kinds[n] in ("moe", "mtp")]) for s, names in self.run.blocks_of(rank).items()
        }
        return sum(moe[op.stage] for op in self.run.schedule.ops(rank) if op.kind == "F")


def fits(ranks: Sequence[RankMemory], machine: Machine) -> bool:
    on_host = max(rank.on_host for rank in ranks)
    return max(rank.total for rank in ranks) <= machine.usable_bytes and on_host <= machine.host.memory_gb * GIGA


def budget(config: Config) -> list[tuple[int, float]]:
    """(sequences, tokens) of the run's steps by batch size, ascending; a ramp's sizes share its tokens evenly."""
    sizes, steps, seq_len = config.batch.sizes(), config.run.steps, config.data.seq_len
    found: list[tuple[int, float]] = []
    for sequences in sizes[:-1]:
        count = min(steps, ceil_div(config.batch.ramp_tokens or 0, len(sizes) * sequences * seq_len))
        found.append((sequences, float(count * sequences * seq_len)))
        steps -= count
    return [*found, (sizes[-1], float(steps * sizes[-1] * seq_len))]


def roofline_times(config: Config, machine: Machine) -> dict[str, PhaseTimes]:
    """Roofline seconds of the phases of every kind of block."""
    size = microbatch_size(config, machine.cuda)
    kinds = dict.fromkeys(block.kind for block in blocks(config.model))
    every = {kind: tasks(config.model, config.fp8, kind, size, config.data.seq_len) for kind in kinds}
    return {kind: roofline(work, machine, config.fp8.fp8) for kind, work in every.items()}


def make(run: LayoutPlan, machine: Machine, profile: Profile | None = None) -> Plan:
    """The plan of a run on a machine, with phase times from the profile if there is one, else by roofline. Raises
    ConfigError if the profile is of another model or microbatch."""
    if profile:
        profile.check(run.config)
    prices, parts = prices_of(run, machine, profile), parts_of(run, machine.cuda)
    timeline = simulate(run.schedule, prices)
    return Plan(
        run=run,
        machine=machine,
        sent=_sent(run.config, machine),
        ranks=with_saves(run, memory_of(run, parts, machine), parts.buckets),
        times=_phase_times(run.config, machine, profile),
        prices=prices,
        timeline=timeline,
        sharding=shard(run, machine, timeline, profile.update_seconds if profile else None),
        source=f"a profile of {profile.device}" if profile else f"roofline of {machine.name}",
    )


def prices_of(run: LayoutPlan, machine: Machine, profile: Profile | None = None) -> StagePrices:
    """Seconds of the ops and pairs of its schedule."""
    config = run.config
    kinds = {block.name: block.kind for block in blocks(config.model)}
    by_kind = _phase_times(config, machine, profile)
    return StagePrices(
        tuple(tuple(by_kind[kinds[name]] for name in names) for names in run.blocks),
        traffic.messages(_sent(config, machine), machine),
        config.parallel.overlap == "on",
        machine.beside_comm,
        profile.whole if profile else 1.0,
        _message_seconds(config, machine),
    )


def memory_of(run: LayoutPlan, parts: Parts, machine: Machine) -> list[RankMemory]:
    """Of every pipeline rank, without the buffer of checkpoints: known before a step is simulated."""
    ranks = memory(run, parts, _sent(run.config, machine), machine.cuda)
    if not run.config.run.buddy_every:
        return ranks
    return with_copies(run, ranks, parts.buckets, topology_of(run.config, machine))


def _phase_times(config: Config, machine: Machine, profile: Profile | None) -> dict[str, PhaseTimes]:
    return profile.times() if profile else roofline_times(config, machine)


def _sent(config: Config, machine: Machine) -> Dispatching:
    return traffic.dispatching(config, topology_of(config, machine), machine.cuda)


def _message_seconds(config: Config, machine: Machine) -> float:
    """Seconds of a pipeline message; the next rank of the pipeline is dp x ep ranks away."""
    p = config.parallel
    if p.pp == 1:
        return 0.0
    size = p.microbatch_sequences * config.data.seq_len * config.model.hidden * DTYPE_BYTES[config.run.dtype]
    link = machine.intra if len(topology_of(config, machine).nodes) == 1 else machine.inter
    return size / (link.gigabytes * GIGA) + machine.latency_us * 1e-6
