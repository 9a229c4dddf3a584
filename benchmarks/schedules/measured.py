"""Every schedule on ranks that sleep: wall time over the simulated ideal, beside torch's and DeepSpeed's runtimes.

    python -m benchmarks.schedules.measured [--ranks 4] [--microbatches 16] [--ms 50 10] [--steps 5] [--picture FILE]

A step of each runtime in turn, so that what else the machine does strikes all; the median over the steps counts. The
ideal is the simulation of the table that the runtime plays, messages costing nothing, at the lengths asked for; "own"
is the same at the lengths that F, I and W take under plain autograd in the same rounds, so that "over own" is what the
runtime adds. A step's wall is from a start that the ranks agree on to the end of the last one. DeepSpeed takes part
where it is installed (extra `deepspeed`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.support.schedule_runners import MAKERS, Idle, Nowhere, Pace, Runner, Sizes, lengths, punctual, reference
from dryvine.comm import local
from dryvine.parallel.executor import Batch, EdgeWire, Executor
from dryvine.parallel.flow_control import rank_program
from dryvine.parallel.overlap import ORDERS
from dryvine.parallel.schedule.costs import Costs
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.simulate import simulate
from dryvine.parallel.schedule.table import build
from dryvine.parallel.stage import Stage
from dryvine.parallel.streams import CpuStreams

HOST = ("dryvine dualpipev", "dryvine zb1p", "torch DualPipeV", "torch ZBVZeroBubble")


@dataclass(frozen=True)
class Row:
    """What one runtime did at one pace. Times in ms."""

    name: str
    pace: float
    ideal: float
    own: float  # the ideal at the ops' real lengths
    walls: list[float]
    error: float  # the greatest deviation of a gradient from the reference, over that gradient's greatest element

    @property
    def wall(self) -> float:
        return statistics.median(self.walls)

    @property
    def over(self) -> float:
        return self.wall / self.ideal - 1


# ---- on a rank


def start_together() -> float:
    """Wait for a moment that all ranks agree on. Returns it in seconds of perf_counter, which all processes share."""
    dist.barrier()
    start = torch.tensor([time.perf_counter() + 0.02], dtype=torch.float64)
    dist.broadcast(start, 0)
    time.sleep(max(0.0, float(start) - time.perf_counter()))
    return float(start)


def wall(runner: Runner) -> float:
    """Seconds of one step of all ranks."""
    start = start_together()
    runner.step()
    spent = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def error(runner: Runner, microbatches: int) -> float:
    """Of the last step's gradients, summed over the copies of a stage."""
    worst = 0.0
    for number, right in enumerate(reference(runner.schedule.stages, microbatches)):
        own = runner.layers.get(number)
        total = torch.zeros_like(right) if own is None else own.weight.gradient().clone()
        dist.all_reduce(total)
        worst = max(worst, float((total - right).abs().max() / right.abs().max()))
    return worst


def clear(runner: Runner) -> None:
    for layer in runner.layers.values():
        layer.weight.gradient().zero_()


def side_by_side(rank: int, sizes: Sizes, names: Sequence[str], paces: Sequence[float], steps: int) -> list[Row]:
    pace = Pace()
    runners = {name: MAKERS[name](sizes, rank, pace) for name in names}
    for runner in runners.values():
        wall(runner)  # connections are made by the first message, and threads with them
    punctual()
    rows = []
    for ms in paces:
        pace.seconds = ms / 1e3
        walls: dict[str, list[float]] = {name: [] for name in names}
        bare = []
        for _ in range(steps):
            dist.barrier()
            bare.append(lengths(pace, 4))
            for name, runner in runners.items():
                clear(runner)
                walls[name].append(1e3 * wall(runner))
        asked, real = Costs(F=ms, I=ms, W=ms), real_costs(torch.cat(bare))
        for name, runner in runners.items():
            ideal, own = simulate(runner.schedule, asked).span, simulate(runner.schedule, real).span
            rows.append(Row(name, ms, ideal, own, walls[name], error(runner, sizes.microbatches)))
    return rows


def real_costs(bare: torch.Tensor) -> Costs:
    """In ms: the median of a rank's samples, and the mean over ranks. Collective."""
    found = 1e3 * bare.median(dim=0).values / dist.get_world_size()
    dist.all_reduce(found)
    f, i, w = found.tolist()
    return Costs(F=f, I=i, W=w)


def host_time(rank: int, sizes: Sizes, name: str, steps: int) -> float:
    """Microseconds of this rank's host per op when nothing sleeps: its thread's CPU time, waits not counted; autograd,
    the layer and gloo's system calls included. The least of the steps: others' work on the machine only adds."""
    runner = MAKERS[name](sizes, rank, Pace())
    runner.step()
    punctual()
    return least(runner.step, steps, dist.barrier) / sum(1 for _ in runner.schedule.ops(rank))


def executor_time(ranks: int, microbatches: int, name: str, steps: int) -> float:
    """Microseconds per op of our executor alone: rank 1's program, with phases and a wire that do nothing."""
    schedule = build(name, ranks, microbatches)
    stages = {number: Stage(number, [Idle(number)]) for number in schedule.stages_of(1)}
    wire = EdgeWire(Nowhere(), lambda edge: ())
    executor = Executor(rank_program(lower(schedule), 1), stages, wire, CpuStreams, ORDERS["cpu"])
    batch = Batch([torch.empty(0)] * microbatches, 1.0)
    return least(lambda: executor.run(batch), steps) / sum(1 for _ in schedule.ops(1))


def least(run: Callable[[], object], times: int, before: Callable[[], object] = lambda: None) -> float:
    """Microseconds of this thread's CPU time."""
    spent = []
    for _ in range(times):
        before()
        start = time.thread_time()
        run()
        spent.append(1e6 * (time.thread_time() - start))
    return min(spent)


# ---- the report


def compare(sizes: Sizes, paces: Sequence[float], steps: int) -> list[Row]:
    names = [name for name in MAKERS if not name.startswith("deepspeed") or find_spec("deepspeed")]
    return local.run(side_by_side, sizes.ranks, sizes, names, paces, steps, deadline=3600)[0]


def host(ranks: int, microbatches: Sequence[int], steps: int) -> dict[str, list[float]]:
    def mean(name: str, m: int) -> float:
        return statistics.mean(local.run(host_time, ranks, Sizes(ranks, m), name, steps, deadline=600))

    alone = {
        f"dryvine {name}, executor alone": [executor_time(ranks, m, name, steps) for m in microbatches]
        for name in ("dualpipev", "zb1p")
    }
    return alone | {name: [mean(name, m) for m in microbatches] for name in HOST}


def overheads(rows: Sequence[Row], title: str) -> Table:
    """Of one pace."""
    table = Table(title=title)
    table.add_column("runtime, schedule", no_wrap=True)
    for head in ("ideal ms", "wall ms", "over ideal", "range", "over own", "gradient error"):
        table.add_column(head, justify="right")
    for row in rows:
        low, high = (100 * (wall / row.ideal - 1) for wall in (min(row.walls), max(row.walls)))
        over, over_own = 100 * row.over, 100 * (row.wall / row.own - 1)
        times = f"{row.ideal:.0f}", f"{row.wall:.1f}", f"{over:+.1f}%", f"{low:+.1f} to {high:+.1f}"
        table.add_row(row.name, *times, f"{over_own:+.1f}%", f"{row.error:.0e}")
    return table


def host_table(found: dict[str, list[float]], microbatches: Sequence[int]) -> Table:
    table = Table("us of host per op", *(f"M = {m}" for m in microbatches))
    for name, times in found.items():
        table.add_row(name, *(f"{t:.1f}" for t in times))
    return table


def picture(rows: Sequence[Row], path: Path) -> None:
    """Bars: the time over the ideal, one panel per pace, one colour per runtime."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"dryvine": "#2a6f97", "torch": "#ee6c4d", "deepspeed": "#8d99ae"}
    paces = list(dict.fromkeys(row.pace for row in rows))
    figure, axes = plt.subplots(1, len(paces), figsize=(6 * len(paces), 4), squeeze=False, layout="constrained")
    for axis, pace in zip(axes[0], paces, strict=True):
        mine = [row for row in rows if row.pace == pace][::-1]
        colour = [colours[row.name.split()[0]] for row in mine]
        bars = axis.barh([row.name for row in mine], [100 * row.over for row in mine], color=colour)
        axis.bar_label(bars, fmt="%.1f%%", padding=3)
        axis.set(title=f"F = I = W = {pace:g} ms", xlabel="wall over simulated ideal, %")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--ms", type=float, nargs="+", default=[50, 10], help="F, I and W each sleep this long")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--host", type=int, nargs="*", default=[16, 64, 256], help="microbatches for Python per op")
    parser.add_argument("--picture", type=Path, default=Path("docs/figures/schedules_measured.svg"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    rows = compare(Sizes(given.ranks, given.microbatches), given.ms, given.steps)
    found = host(given.ranks, given.host, 9)
    picture(rows, given.picture)
    if given.json:
        given.json.write_text(json.dumps({"rows": [vars(row) for row in rows], "host_us": found}, indent=1))
    console = Console(width=100)
    console.print(host_table(found, given.host))
    sizes = f"P = {given.ranks}, M = {given.microbatches}, median of {given.steps}"
    for pace in given.ms:
        title = f"F = I = W = {pace:g} ms, {sizes}, load {load:.1f} before, {os.getloadavg()[0]:.1f} after"
        console.print(overheads([row for row in rows if row.pace == pace], title))


if __name__ == "__main__":
    main()
