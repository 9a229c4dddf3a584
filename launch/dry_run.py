"""`dryvine train CONFIG --dry-run [--rank R]`: the whole run but its arithmetic, in one process without torch.

The config is resolved, the model cut into stages, the schedule of every batch size built, checked, lowered and
simulated, and every buffer sized, for as many ranks as the config asks. What one rank would then do is written out:
its place, its peers, its blocks, its shards, its slots. Starting N processes that do nothing would find the same
faults, and needs a machine that holds N of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dryvine.launch.plan.hardware import Machine
from dryvine.launch.plan.plan import Plan, make
from dryvine.launch.plan.shards import BucketSize, buckets
from dryvine.launch.plan.summary import headline, memory_rows, print_table
from dryvine.launch.plan.traffic import topology_of
from dryvine.parallel.flow_control import rank_program, slots_by_line
from dryvine.parallel.schedule.ir import Edge, Program, ProgramStep
from dryvine.parallel.schedule.notation import slot_text
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.data.config import STDLIB
from dryvine.trainer.run_plan import RunPlan

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 12  # slots printed at each end of a rank's list


class RankPlace(NamedTuple):
    """A world rank's coordinates, numbered as in `comm.mesh`."""

    rank: int
    pp: int
    dp: int
    ep: int

    @staticmethod
    def of(rank: int, config: Config) -> RankPlace:
        p = config.parallel
        if not 0 <= rank < p.world:
            raise ConfigError(f"--rank {rank}: the layout has ranks 0 to {p.world - 1}")
        return RankPlace(rank, rank // (p.dp * p.ep), rank // p.ep % p.dp, rank % p.ep)

    def at(self, pp_rank: int, config: Config) -> int:
        """The world rank with these coordinates on another pipeline rank."""
        return self.rank + (pp_rank - self.pp) * config.parallel.dp * config.parallel.ep


def dry_run(run: RunPlan, machine: Machine, rank: int, console: Console) -> None:
    """Print the run as it would happen. Raises ConfigError."""
    place, plan = RankPlace.of(rank, run.config), make(run, machine)
    program = run.training[run.config.batch.sequences]
    for line in (*headline(plan), *_whole(plan), *_of_rank(plan, program, place)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    heads, rows = memory_rows(plan)
    print_table(console, "memory of each pipeline rank, GB", ["", *heads], rows)
    print_table(
        console,
        f"slots of rank {rank} in a full step",
        ["slot", "ops", "starts at, s", "receives", "sends"],
        _slots(plan, program, place),
    )


def _whole(plan: Plan) -> Iterator[str]:
    """Facts about the whole run."""
    run, sizes = plan.run, plan.config.batch.sizes()
    many = f"{len(sizes)} batch sizes, {sizes[0]:,} to {sizes[-1]:,} sequences" if len(sizes) > 1 else "one batch size"
    yield f"schedules: {many}; each built, checked and lowered"
    yield f"simulated: {plan.timeline.figures} (seconds)"
    for stage, names in enumerate(run.blocks):
        yield f"stage {stage}, on pipeline rank {' and '.join(map(str, run.schedule.copies(stage)))}: {_spans(names)}"
    source = STDLIB if plan.config.sft or plan.config.rl else plan.config.data.source
    if source != STDLIB and not (Path(source) / "dataset.json").exists():
        yield f"data: {source} is not on this machine; a run does not start without it (see `dryvine data build`)"


def _of_rank(plan: Plan, program: Program, place: RankPlace) -> Iterator[str]:
    """What one rank holds, and which ranks it talks to."""
    run, config, p = plan.run, plan.config, plan.config.parallel
    topology = topology_of(config, plan.machine)
    yield (
        f"rank {place.rank}: pipeline rank {place.pp} of {p.pp}, data rank {place.dp} of {p.dp}, "
        f"expert rank {place.ep} of {p.ep}; GPU {topology.rail_of(place.rank)} of node {topology.node_of(place.rank)}"
    )
    share, first = config.model.routed // p.ep, place.rank - place.ep
    yield (
        f"  experts {place.ep * share} to {(place.ep + 1) * share - 1} of every MoE layer; all-to-all over ranks "
        f"{first} to {first + p.ep - 1} by {plan.sent.name}"
    )
    near = sorted(place.at(other, config) for other in _neighbours(program, place.pp))
    yield f"  pipeline messages with rank {' and '.join(map(str, near))}" if near else "  no pipeline messages"
    for stage, names in run.blocks_of(place.pp).items():
        yield f"  stage {stage}: {_spans(names)}"
    yield from (f"  {_bucket(bucket)}" for bucket in buckets(run)[place.pp])
    size, ranks = p.microbatch_sequences, p.dp * p.ep
    data_rank = place.rank % ranks
    own = f"{data_rank * size}" + (f" to {data_rank * size + size - 1}" if size > 1 else "")
    yield f"  sequence {own} of a step, and so on every {ranks * size}"


def _neighbours(program: Program, pp_rank: int) -> set[int]:
    """The pipeline ranks that it exchanges messages with."""
    lines = slots_by_line([program])
    return {end for line in lines if pp_rank in (line.source, line.target) for end in line[:2]} - {pp_rank}


def _bucket(bucket: BucketSize) -> str:
    homes = ", ".join(map(str, bucket.homes))
    return (
        f"bucket of {bucket.layout.name}: {bucket.layout.elements:,} elements; gradients are summed over "
        f"{bucket.copies:,} ranks (pipeline ranks {homes}), of which each updates {bucket.shard:,}"
    )


def _slots(plan: Plan, program: Program, place: RankPlace) -> list[tuple[str, ...]]:
    """The first and last slots of a rank."""
    cells = plan.timeline.cells[place.pp]
    timed = enumerate(zip(rank_program(program, place.pp).steps, cells, strict=True))
    rows = [_slot(number, step, cell.start, place, plan.config) for number, (step, cell) in timed]
    if len(rows) <= 2 * SHOWN:
        return rows
    middle = Counter("&".join(sorted(op.kind for op in cell.slot)) for cell in cells[SHOWN:-SHOWN])
    between = ", ".join(f"{count} x {kinds}" for kinds, count in middle.most_common())
    return [*rows[:SHOWN], ("...", between, "", "", ""), *rows[-SHOWN:]]


def _slot(number: int, step: ProgramStep, start: float, place: RankPlace, config: Config) -> tuple[str, ...]:
    def peers(edges: tuple[Edge, ...], source: bool) -> str:
        return ", ".join(f"rank {place.at(edge.source if source else edge.target, config)}" for edge in edges)

    return str(number), slot_text(step.slot), f"{start:.3f}", peers(step.receives, True), peers(step.sends, False)


def _spans(names: tuple[str, ...]) -> str:
    """Consecutive blocks joined: embed, layers.0, layers.1, layers.2 as "embed, layers.0 to layers.2"."""
    runs: list[list[str]] = []
    for name in names:
        last = runs[-1][-1] if runs else ""
        stem, _, number = name.rpartition(".")
        if stem and last == f"{stem}.{int(number) - 1}":
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
