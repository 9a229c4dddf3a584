"""The execution plan of a config: the schedule of every batch size, checked and lowered, and the assignment of the
model's blocks to pipeline stages.

Made from the config before any process group exists and passed to whatever needs a part of it, so an impossible
layout is refused before a GPU is used, and there is only one source of schedules. Every size of a batch ramp is planned
at the start: one that cannot run would otherwise stop the run on the day the ramp reaches it. This takes a few seconds
for the 23 batch sizes of DeepSeek-V3 on 16 pipeline ranks. Torch-free, so that a login node can plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dryvine.comm.integers import ceil_div
from dryvine.parallel.partition import partition
from dryvine.parallel.schedule.check import check
from dryvine.parallel.schedule.footprint import Footprint
from dryvine.parallel.schedule.ir import Program, Schedule
from dryvine.parallel.schedule.lower import forward_only
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.table import build, legal
from dryvine.trainer.config import Config, ConfigError, load
from dryvine.trainer.model.shape import units

MOST_OPS = 5_000_000  # over all batch sizes: V3's have 80,000, and a million take about ten seconds
Blocks = tuple[str, ...]  # names, in forward order


@dataclass(frozen=True)
class LayoutPlan:
    """What a plan needs of a run before any program exists. `footprints` maps batch sizes in sequences to the schedule
    of such a step; `blocks[s]` are the names of the blocks of stage s."""

    config: Config
    footprints: Mapping[int, Footprint]
    blocks: tuple[Blocks, ...]

    @property
    def footprint(self) -> Footprint:
        """The footprint of the largest batch size, with which the ramp ends."""
        return self.footprints[self.config.batch.sequences]

    @property
    def schedule(self) -> Schedule:
        """The schedule of the largest batch size."""
        return self.footprint.schedule

    def blocks_of(self, pp_rank: int) -> dict[int, Blocks]:
        """The blocks of each stage that a pipeline rank holds, by the stage's number."""
        return {stage: self.blocks[stage] for stage in self.schedule.stages_of(pp_rank)}


@dataclass(frozen=True)
class RunPlan(LayoutPlan):
    """`training` maps batch sizes in sequences to the program of such a step; `validation` is the program of a
    validation batch, which is as large as the largest step."""

    training: Mapping[int, Program]
    validation: Program

    @property
    def programs(self) -> tuple[Program, ...]:
        """Every program that the run may execute."""
        return (*self.training.values(), self.validation)


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> RunPlan:
    """The plan of the run that a TOML file and overrides describe (see `config.load`). Raises ConfigError."""
    config = load(path, overrides)
    try:
        return make_plan(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def make_plan(config: Config) -> RunPlan:
    """Build, check and lower a schedule per batch size, and partition the model. Raises ConfigError."""
    layout = LayoutPlans().of(config)
    try:
        training = {n: check(footprint.schedule) for n, footprint in layout.footprints.items()}
        validation = check(forward_only(layout.schedule))
    except ScheduleError as error:
        raise ConfigError(f"parallel.schedule: {error}") from None
    return RunPlan(config, layout.footprints, layout.blocks, training, validation)


class LayoutPlans:
    """Makes layouts, with a cache of schedules by name and sizes and of partitions of a model. Layouts that differ only
    in data and expert parallelism share both, so a sweep uses one of these for all of its layouts."""

    def __init__(self) -> None:
        self._footprints: dict[tuple[str, int, int, int], Footprint] = {}
        self._splits: dict[tuple[tuple[float, ...], int], tuple[range, ...]] = {}

    def of(self, config: Config) -> LayoutPlan:
        """The layout of a config, whose schedules are built and not checked: `make_plan` checks. Raises ConfigError."""
        if (ops := _ops(config)) > MOST_OPS:
            raise ConfigError(
                f"batch.sequences = {config.batch.sequences}, of which parallel.dp x ep ranks take "
                f"microbatch_sequences at a time: schedules of {ops:,} ops, and {MOST_OPS:,} can be planned; "
                "raise microbatch_sequences or dp"
            )
        footprints = {sequences: self._footprint(config, sequences) for sequences in _sizes(config)}
        full = footprints[config.batch.sequences].schedule
        return LayoutPlan(config, footprints, self._split(config, full.stages))

    def _footprint(self, config: Config, sequences: int) -> Footprint:
        """The footprint of a step of `sequences`, the same on all data ranks. Raises ConfigError."""
        p, microbatches = config.parallel, _microbatches(config, sequences)
        key = (p.schedule, p.pp, microbatches, p.chunks)
        if key not in self._footprints:
            try:
                self._footprints[key] = Footprint(build(*key))
            except ScheduleError as error:
                each = p.microbatch_sequences * p.dp * p.ep
                sizes = f"microbatches = batch.sequences {sequences} / {each}"
                raise ConfigError(f"parallel.schedule: {error} ({sizes})") from None
        return self._footprints[key]

    def _split(self, config: Config, stages: int) -> tuple[Blocks, ...]:
        """The blocks of each stage, so that the slowest stage is as fast as can be."""
        parts = units(config.model, config.data.seq_len)
        key = tuple(sum(block.cost for block in unit) for unit in parts), stages
        if key not in self._splits:
            try:
                self._splits[key] = partition(*key)
            except ValueError as error:
                p = config.parallel
                raise ConfigError(f"parallel.pp = {p.pp}, schedule {p.schedule}: {error}") from None
        return tuple(tuple(block.name for i in r for block in parts[i]) for r in self._splits[key])


def _sizes(config: Config) -> list[int]:
    """Batch sizes in sequences. An update of reinforcement learning has as many rows as its answers fill, at most
    batch.sequences at a time; eighths of that are planned where the schedule permits them."""
    if config.rl is None:
        return config.batch.sizes()
    p, full = config.parallel, config.batch.sequences
    per_microbatch = p.microbatch_sequences * p.dp * p.ep
    parts = {ceil_div(full * eighths, 8 * per_microbatch) for eighths in range(1, 8)}
    fewer = [n for n in sorted(parts) if n * per_microbatch < full and not legal(p.schedule, p.pp, n, p.chunks)]
    return [*(n * per_microbatch for n in fewer), full]


def _ops(config: Config) -> int:
    """About how many ops the schedules of all batch sizes have: F, I and W of every microbatch and stage."""
    p, sizes = config.parallel, _sizes(config)
    return 3 * sum(sizes) * p.pp * p.chunks // (p.microbatch_sequences * p.dp * p.ep)


def _microbatches(config: Config, sequences: int) -> int:
    """Of a step: each data rank runs a pipeline of its own, and so many microbatches. Raises ConfigError."""
    p = config.parallel
    per_microbatch = p.microbatch_sequences * p.dp * p.ep
    microbatches, rest = divmod(sequences, per_microbatch)
    if rest:
        raise ConfigError(
            f"batch.sequences = {sequences} is not a multiple of microbatch_sequences x dp x ep = {per_microbatch}; "
            f"try {max(1, microbatches) * per_microbatch} or {(microbatches + 1) * per_microbatch}"
        )
    return microbatches
