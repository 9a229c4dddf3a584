"""Step times of small layouts on gloo ranks beside plans from a profile of another layout.

    python -m benchmarks.planner [--rounds 5] [--layouts 'ep 2' ...]

The profile is that of the whole model in one process; layouts then cut the model, share it, or both. Routing is made
even, as plans suppose it. Other work on the machine changes from second to second, so ranks profile and step in turn,
each beside the other, and a step is planned from the profiles of its ranks just before and after it. So is the latency
of a message, between ranks that compute before each, as in a step: who computes longer is waited for. Two ratios: the
median of rounds, and the least of all plans over the least of all steps, which other work disturbs less. Goal: within
10%, by the least.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from dryvine.comm import local
from dryvine.comm.host import MALLOC
from dryvine.launch.plan.hardware import Machine, load_hardware
from dryvine.launch.plan.plan import Plan, make
from dryvine.launch.plan.profiled import Profile
from dryvine.launch.profile import measure
from dryvine.trainer.config import Config, load
from dryvine.trainer.data.prepare import prepare
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.ramps import Point, points
from dryvine.trainer.rig import Rig, make_rig, mesh_of
from dryvine.trainer.run_plan import RunPlan, make_plan
from dryvine.trainer.step import train_step
from tests.support.live import evenly

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
STEPS = 2  # of a round
MICROBATCHES = 3  # measured in a step of a profile
MESSAGES, PRODUCTS = 200, 4  # of a latency, and those of 256 x 256 x 256 before each: 2 ms, as a block's phases


class Seconds(NamedTuple):
    """Of a step: the schedule, and what comes after it."""

    schedule: float
    rest: float

    @property
    def all(self) -> float:
        return self.schedule + self.rest


class RankRounds(NamedTuple):
    """Of one rank: the steps of each round, and the profiles around them."""

    steps: list[list[Seconds]]
    profiles: list[Profile]
    latencies: list[float]  # seconds of a message


class Compared(NamedTuple):
    """A layout, planned before and after each round, and measured in it."""

    planned: list[Seconds]
    measured: list[list[Seconds]]

    @property
    def rounds(self) -> list[float]:
        """Planned over measured, of each round."""
        around = (mean(plan.all for plan in pair) for pair in pairwise(self.planned))
        return [plan / mean(step.all for step in steps) for plan, steps in zip(around, self.measured, strict=True)]

    @property
    def least(self) -> tuple[Seconds, Seconds]:
        """Of all plans, and of all steps."""
        steps = (step for steps in self.measured for step in steps)
        return min(self.planned, key=lambda s: s.all), min(steps, key=lambda s: s.all)


def in_turn(rank: int, config: Config, whole: Config, rounds: int) -> RankRounds:
    """For `local.run`: a profile of `whole`, then a round of steps of `config`, and so on."""
    plan, cpu = make_plan(config), torch.device("cpu")
    rig = make_rig(plan, mesh_of(plan, cpu), open_data(config))
    for gate in rig.model.gates.values():
        gate.choose = evenly(gate)  # type: ignore[method-assign]
    every = iter(points(config.batch, config.data.seq_len))
    found = RankRounds([], [], [])
    for number in range(rounds + 2):
        steps = [timed(rig, point) for point in islice(every, STEPS)]
        rig.mesh.sum(torch.zeros(1), "the end of a round")
        if number:  # the first is a warm-up
            found.profiles.append(measure(whole, cpu, MICROBATCHES, lambda part: None))
            found.steps.append(steps)
            rig.mesh.sum(torch.zeros(1), "the end of a profile")
            found.latencies.append(latency())
    return found._replace(steps=found.steps[1:])


def latency() -> float:
    """Mean seconds of an all-to-all of one number a rank. Collective."""
    numbers = torch.zeros(torch.distributed.get_world_size())
    square, seconds = torch.ones(256, 256), list[float]()
    for _ in range(MESSAGES):
        for _ in range(PRODUCTS):
            torch.mm(square, square)
        started = time.perf_counter()
        torch.distributed.all_to_all_single(torch.empty_like(numbers), numbers)
        seconds.append(time.perf_counter() - started)
    return mean(seconds)


def timed(rig: Rig, point: Point) -> Seconds:
    started = time.perf_counter()
    played = train_step(rig, point).played
    return Seconds(played.ended - started, time.perf_counter() - played.ended)


def compare(config: Config, whole: Config, rounds: int) -> Compared:
    """Planned: means over ranks, whose profiles and latencies differ. Measured: each step as long as on its slowest
    rank."""
    ranks = local.run(in_turn, config.parallel.world, config, whole, rounds, deadline=500.0)
    run, machine = make_plan(config), load_hardware("cpu")
    plans = [
        [_planned(run, machine, each.profiles[number], each.latencies[number]) for each in ranks]
        for number in range(rounds + 1)
    ]
    steps = [[_slowest(of) for of in zip(*each, strict=True)] for each in zip(*(r.steps for r in ranks), strict=True)]
    return Compared([_mean(of) for of in plans], steps)


def _planned(run: RunPlan, machine: Machine, profile: Profile, seconds: float) -> Plan:
    return make(run, machine.model_copy(update={"latency_us": 1e6 * seconds}), profile)


def _slowest(ranks: Sequence[Seconds]) -> Seconds:
    return max(ranks, key=lambda seconds: seconds.all)


def _mean(plans: Sequence[Plan]) -> Seconds:
    return Seconds(mean(plan.timeline.span for plan in plans), mean(plan.optimizer_seconds for plan in plans))


def _row(name: str, found: Compared) -> list[str]:
    figures = [figure for side in found.least for figure in (side.all, side.schedule, side.rest)]
    rounds = sorted(found.rounds)
    return [
        name,
        *(f"{1e3 * figure:.1f}" for figure in figures),
        f"{ratio(found):.3f}",
        f"{median(rounds):.3f}",
        f"{rounds[0]:.2f} to {rounds[-1]:.2f}",
    ]


def ratio(found: Compared) -> float:
    """Planned over measured, of the least of both."""
    planned, measured = found.least
    return planned.all / measured.all


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    options = parser.parse_args()
    os.environ |= MALLOC  # as `dryvine train` starts ranks on a CPU
    local.preload("dryvine.launch.plan.plan", "dryvine.launch.profile", "dryvine.trainer.step")
    table = Table(
        "layout", "planned, ms", "schedule", "rest", "measured, ms", "schedule", "rest", "ratio", "median", "rounds",
        title="steps on gloo, from a profile",
    )  # fmt: skip
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        base = (*BASE, f'run.out="{folder}"')
        whole = load("configs/tiny_cpu.toml", base)
        prepare(whole.data)
        for name in options.layouts:
            found = compare(load("configs/tiny_cpu.toml", (*base, *LAYOUTS[name])), whole, options.rounds)
            row = _row(name, found)
            worst = max(worst, abs(ratio(found) - 1))
            table.add_row(*row)
            print(*row, sep="  ", file=sys.stderr, flush=True)
    Console(width=110).print(table)
    load_now = Path("/proc/loadavg").read_text().split()[0]
    print(f"largest error {worst:.1%}; goal 10%; one thread a rank, load {load_now}")
    return 0 if worst <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
