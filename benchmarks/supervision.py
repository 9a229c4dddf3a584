"""What being watched and written down takes of a step: the watch over other ranks, and the journal.

    python -m benchmarks.supervision [--config configs/tiny_cpu.toml] [--steps 12] [--set KEY=VALUE ...]

Two pipeline ranks of this machine train under DualPipe as `dryvine train` has them. What the watch does between
operations is timed by the clock in the thread that trains, and by the processor's in its own; a row of the journal,
with TensorBoard's, by the clock on rank 0. The limit is a share of the median step of the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from dryvine.comm import local
from dryvine.comm.watch import Watch, watch_world
from dryvine.trainer.config import Config, load
from dryvine.trainer.journal import Journal
from dryvine.trainer.loop import train
from dryvine.trainer.rig import mesh_of
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.run_rows import read
from dryvine.trainer.sources import open_sources

LIMIT = 0.005  # of a step
WARM = 2  # steps that are left out


@dataclass
class Meter:
    """Calls and their time."""

    calls: int = 0
    seconds: float = 0.0

    def over(self, owner: type, name: str, clock: Callable[[], float]) -> None:
        """From now on all calls of a method are counted here."""
        real = getattr(owner, name)

        def timed(*given: object, **named: object) -> object:
            started = clock()
            try:
                return real(*given, **named)
            finally:
                self.calls += 1
                self.seconds += clock() - started

        setattr(owner, name, timed)


def measure(rank: int, config: Config) -> dict[str, Meter]:
    """On one rank, in a whole run."""
    meters = {"watch, per operation": Meter(), "watch, its thread": Meter(), "journal": Meter()}
    for name in ("expect", "over"):
        meters["watch, per operation"].over(Watch, name, time.perf_counter)
    for name in ("_look", "_called"):
        meters["watch, its thread"].over(Watch, name, time.thread_time)
    meters["journal"].over(Journal, "write", time.perf_counter)
    plan = make_plan(config)
    watch = watch_world(config.comm.deadline)
    train(plan, replace(mesh_of(plan, torch.device("cpu")), watch=watch), open_sources(config))
    watch.close()
    return meters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "tiny_cpu.toml")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", nargs="*", default=[], help="more of the config, as table.key=value")
    given = parser.parse_args()
    layout = ("parallel.pp=2", "parallel.dp=1", "parallel.ep=1", "parallel.schedule=dualpipe", "run.device=cpu")
    with tempfile.TemporaryDirectory() as out:
        often = (f"run.out={out}", f"run.steps={given.steps}", "run.eval_every=100000", "run.checkpoint_every=100000")
        config = load(given.config, (*layout, *often, *given.set))
        found = local.run(measure, 2, config, deadline=3600)
        seconds = [float(row["seconds"] or 0) for row in read(config.run.folder)]
    step = median(seconds[WARM:])
    table = Table("", "calls a step", "us a step", "of a step", title=f"a step of {1e3 * step:.0f} ms, rank 0")
    total = 0.0
    for name, meter in found[0].items():
        each = meter.seconds / given.steps
        total += each
        table.add_row(name, f"{meter.calls / given.steps:.1f}", f"{1e6 * each:.0f}", f"{each / step:.2%}")
    verdict = "kept" if total <= LIMIT * step else "missed"
    table.add_row("all", "", f"{1e6 * total:.0f}", f"{total / step:.2%}: limit of {LIMIT:.1%} {verdict}")
    Console().print(table)


if __name__ == "__main__":
    main()
