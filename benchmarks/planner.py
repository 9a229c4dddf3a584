"""Step times of small layouts on gloo ranks beside plans from a profile of another layout.

    python -m benchmarks.planner [--steps 6] [--rounds 8] [--layouts 'ep 2' ...]

The profile is that of one process per core with the whole model in it; layouts then cut the model, share it, or both.
Profiles and layouts take turns, and each layout is planned from the profiles before and after it, since other work on
the machine changes from minute to minute. Goal: within 10%.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from dryvine.comm import local
from dryvine.comm.host import MALLOC
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.plan import make
from dryvine.launch.plan.profiled import Profile
from dryvine.launch.profile import measure
from dryvine.trainer.config import Config, load
from dryvine.trainer.data.prepare import prepare
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import make_rig, mesh_of
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.step import train_step

BASE = (
    "model.layers=6",
    "model.mtp_depth=0",
    "data.seq_len=128",
    "batch.sequences=16",
    "parallel.ep=1",
    "parallel.pp=1",
    "parallel.schedule=1f1b",
)
LAYOUTS = {
    "pp 2, dualpipe": ("parallel.pp=2", "parallel.schedule=dualpipe"),
    "pp 2, 1F1B": ("parallel.pp=2",),
    "pp 2, zb1p": ("parallel.pp=2", "parallel.schedule=zb1p"),
    "pp 2, dualpipev": ("parallel.pp=2", "parallel.schedule=dualpipev"),
    "pp 2, interleaved": ("parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=2"),
    "ep 2": ("parallel.ep=2",),
    "dp 2": ("parallel.dp=2",),
    "dp 2, gpipe": ("parallel.dp=2", "parallel.schedule=gpipe"),
}
CORES = 2


def profile(rank: int, config: Config, rounds: int) -> Profile:
    """For `local.run`: each core is measured while the others are busy too."""
    return measure(config, torch.device("cpu"), rounds, lambda kind: None)


class Seconds(NamedTuple):
    """Of a step: the schedule, and what comes after it."""

    schedule: float
    rest: float

    @property
    def all(self) -> float:
        return self.schedule + self.rest


def steps(rank: int, config: Config, count: int) -> list[Seconds]:
    """For `local.run`: of `count` steps after a first one."""
    plan = make_plan(config)
    rig = make_rig(plan, mesh_of(plan, torch.device("cpu")), open_data(config))
    times = []
    for point in islice(points(config.batch, config.data.seq_len), count + 1):
        started = time.perf_counter()
        played = train_step(rig, point).played
        times.append(Seconds(played.ended - started, time.perf_counter() - played.ended))
    return times[1:]


def slowest(ranks: Sequence[Sequence[Seconds]]) -> Seconds:
    """The median of the steps, each as long as on its slowest rank."""
    each = [max(of, key=lambda seconds: seconds.all) for of in zip(*ranks, strict=True)]
    return sorted(each, key=lambda seconds: seconds.all)[len(each) // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=8, help="microbatches in a step of a profile")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    options = parser.parse_args()
    os.environ |= MALLOC  # as `dryvine train` starts ranks on a CPU
    local.preload("dryvine.launch.plan.plan", "dryvine.launch.profile", "dryvine.trainer.step")
    table = Table(
        "layout", "planned, ms", "schedule", "rest", "measured, ms", "schedule", "rest", "planned / measured",
        title="steps on gloo, from a profile",
    )  # fmt: skip
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        base = (*BASE, f'run.out="{folder}"')
        whole = load("configs/tiny_cpu.toml", base)
        prepare(whole.data)
        before = local.run(profile, CORES, whole, options.rounds)
        for name in options.layouts:
            config = load("configs/tiny_cpu.toml", (*base, *LAYOUTS[name]))
            measured = slowest(local.run(steps, config.parallel.world, config, options.steps, deadline=500.0))
            after = local.run(profile, CORES, whole, options.rounds)
            run, machine = make_plan(config), load_hardware("cpu")
            plans = [make(run, machine, one) for one in (*before, *after)]
            planned = Seconds(
                *(mean(of) for of in zip(*((p.timeline.span, p.optimizer_seconds) for p in plans), strict=True))
            )
            before, ratio = after, planned.all / measured.all
            worst = max(worst, abs(ratio - 1))
            figures = (planned.all, *planned, measured.all, *measured)
            table.add_row(name, *(f"{1e3 * seconds:.1f}" for seconds in figures), f"{ratio:.3f}")
            print(name, f"{ratio:.3f}", file=sys.stderr, flush=True)
    Console(width=100).print(table)
    print(
        f"largest error {worst:.1%}; goal 10%; one thread a rank, {Path('/proc/loadavg').read_text().split()[0]} load"
    )
    return 0 if worst <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
