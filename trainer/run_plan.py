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
from dryvine.parallel.config import ParallelConfig
from dryvine.parallel.partition import partition
from dryvine.parallel.schedule.check import check
from dryvine.parallel.schedule.ir import Program, Schedule
from dryvine.parallel.schedule.lower import forward_only, lower
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.table import build, legal
from dryvine.trainer.config import Config, ConfigError, load
from dryvine.trainer.model.shape import units

MOST_OPS = 5_000_000  # over all batch sizes: V3's have 80,000, and a million take about ten seconds
Blocks = tuple[str, ...]  # names, in forward order


@dataclass(frozen=True)
class RunPlan:
    """`training` maps batch sizes in sequences to the program of such a step; `validation` is the program of a
    validation batch, which is as large as the largest step. `blocks[s]` are the names of the blocks of stage s."""

    config: Config
    training: Mapping[int, Program]
    validation: Program
    blocks: tuple[Blocks, ...]

    @property
    def schedule(self) -> Schedule:
        """The schedule of the largest batch size, with which the ramp ends."""
        return self.training[self.config.batch.sequences].schedule

    @property
    def programs(self) -> tuple[Program, ...]:
        """Every program that the run may execute."""
        return (*self.training.values(), self.validation)

    def blocks_of(self, pp_rank: int) -> dict[int, Blocks]:
        """The blocks of each stage that a pipeline rank holds, by the stage's number."""
        return {stage: self.blocks[stage] for stage in self.schedule.stages_of(pp_rank)}


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> RunPlan:
    """The plan of the run that a TOML file and overrides describe (see `config.load`). Raises ConfigError."""
    config = load(path, overrides)
    try:
        return make_plan(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


class Programs:
    """A cache of programs by schedule and sizes, each built, checked and lowered once. Layouts that differ only in data
    and expert parallelism share programs, so a sweep uses one cache for all of its layouts."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int, int, int, bool], Program] = {}

    def training(self, parallel: ParallelConfig, microbatches: int) -> Program:
        """The program of a training step. Raises ScheduleError."""
        return self._program(parallel, microbatches, forwards=False)

    def validation(self, parallel: ParallelConfig, microbatches: int) -> Program:
        """The program of a validation batch: the forwards alone."""
        return self._program(parallel, microbatches, forwards=True)

    def _program(self, p: ParallelConfig, microbatches: int, forwards: bool) -> Program:
        key = (p.schedule, p.pp, microbatches, p.chunks, forwards)
        if key not in self._made:
            whole = self.training(p, microbatches).schedule if forwards else build(*key[:4])
            self._made[key] = _checked(forward_only(whole) if forwards else whole)
        return self._made[key]


def make_plan(config: Config, programs: Programs | None = None) -> RunPlan:
    """Build, check and lower a schedule per batch size, and partition the model. `programs` is a cache, which is added
    to. Raises ConfigError."""
    if (ops := _ops(config)) > MOST_OPS:
        raise ConfigError(
            f"batch.sequences = {config.batch.sequences}, of which parallel.dp x ep ranks take microbatch_sequences at "
            f"a time: schedules of {ops:,} ops, and {MOST_OPS:,} can be planned; raise microbatch_sequences or dp"
        )
    made = programs or Programs()
    training = {sequences: _program(config, sequences, made) for sequences in _sizes(config)}
    full = training[config.batch.sequences].schedule
    validation = made.validation(config.parallel, full.microbatches)
    return RunPlan(config, training, validation, _split(config, full.stages))


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


def _program(config: Config, sequences: int, made: Programs) -> Program:
    """The program of a step of `sequences`, counted over all data ranks."""
    p = config.parallel
    # Each data rank runs a pipeline of its own with an equal share of the microbatches.
    per_microbatch = p.microbatch_sequences * p.dp * p.ep
    microbatches, rest = divmod(sequences, per_microbatch)
    if rest:
        raise ConfigError(
            f"batch.sequences = {sequences} is not a multiple of microbatch_sequences x dp x ep = {per_microbatch}; "
            f"try {max(1, microbatches) * per_microbatch} or {(microbatches + 1) * per_microbatch}"
        )
    try:
        return made.training(p, microbatches)
    except ScheduleError as error:
        sizes = f"microbatches = batch.sequences {sequences} / {per_microbatch}"
        raise ConfigError(f"parallel.schedule: {error} ({sizes})") from None


def _checked(schedule: Schedule) -> Program:
    check(schedule)
    return lower(schedule)


def _split(config: Config, stages: int) -> tuple[Blocks, ...]:
    """The names of the blocks of each stage, such that the cost of the slowest stage is minimal."""
    parts = units(config.model, config.data.seq_len)
    try:
        ranges = partition([sum(block.cost for block in unit) for unit in parts], stages)
    except ValueError as error:
        raise ConfigError(f"parallel.pp = {config.parallel.pp}, schedule {config.parallel.schedule}: {error}") from None
    return tuple(tuple(block.name for i in r for block in parts[i]) for r in ranges)
