"""Step times of small layouts on gloo ranks beside plans from a profile of another layout.

    python -m benchmarks.planner [--steps 6] [--rounds 3]

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
from itertools import islice
from pathlib import Path
from statistics import mean, median

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


def steps(rank: int, config: Config, count: int) -> float:
    """For `local.run`: the median of the seconds of `count` steps after a first one."""
    plan = make_plan(config)
    rig = make_rig(plan, mesh_of(plan, torch.device("cpu")), open_data(config))
    times = []
    for point in islice(points(config.batch, config.data.seq_len), count + 1):
        started = time.perf_counter()
        train_step(rig, point)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="microbatches of each block in a profile")
    options = parser.parse_args()
    os.environ |= MALLOC  # as `dryvine train` starts ranks on a CPU
    local.preload("benchmarks.planner")
    table = Table("layout", "planned, s", "measured, s", "planned / measured", title="steps on gloo, from a profile")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        base = (*BASE, f'run.out="{folder}"')
        whole = load("configs/tiny_cpu.toml", base)
        prepare(whole.data)
        before = local.run(profile, CORES, whole, options.rounds)
        for name, overrides in LAYOUTS.items():
            config = load("configs/tiny_cpu.toml", (*base, *overrides))
            measured = max(local.run(steps, config.parallel.world, config, options.steps, deadline=500.0))
            after = local.run(profile, CORES, whole, options.rounds)
            run, machine = make_plan(config), load_hardware("cpu")
            planned = mean(make(run, machine, one).step_seconds for one in (*before, *after))
            before, ratio = after, planned / measured
            worst = max(worst, abs(ratio - 1))
            table.add_row(name, f"{planned:.3f}", f"{measured:.3f}", f"{ratio:.3f}")
            print(name, f"{ratio:.3f}", file=sys.stderr, flush=True)
    Console(width=100).print(table)
    print(
        f"largest error {worst:.1%}; goal 10%; one thread a rank, {Path('/proc/loadavg').read_text().split()[0]} load"
    )
    return 0 if worst <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
