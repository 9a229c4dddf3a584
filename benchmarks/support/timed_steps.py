"""Steps of one layout, timed in fresh processes: what `benchmarks.two_gpus` compares.

The real trainer without its loop: nothing is saved, and several batch sizes are timed with the same weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from dryvine.comm import local
from dryvine.comm.mesh import Mesh
from dryvine.parallel.schedule.simulate import Timeline
from dryvine.trainer.activations import held_bytes
from dryvine.trainer.config import Config
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.metrics import reduce_figures
from dryvine.trainer.ramps import Point
from dryvine.trainer.rehearse import rehearse
from dryvine.trainer.rig import Rig, make_rig, mesh_of
from dryvine.trainer.run_plan import RunPlan, make_plan
from dryvine.trainer.step import train_step
from dryvine.trainer.timeline import gather_timeline, simulated_again

WARM, STEPS = 2, 5


@dataclass(frozen=True)
class Timed:
    """Medians over steps of one batch size, over all ranks. Seconds, bytes."""

    seconds: float
    tokens_per_second: float
    bubble: float
    exposed: float  # the mean over ranks
    played: float  # the schedule alone: no optimizer
    over_simulated: float  # the last step's schedule over its simulation at the measured mean costs
    timeline: Timeline | None  # of the last step; None except on rank 0


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank while it stepped, and what was to be expected."""

    peak: int
    state: int  # weights, gradients, moments and buffers, before the first step
    activations: int  # as predicted

    @property
    def over_predicted(self) -> float:
        return self.peak / (self.state + self.activations)


def timed(config: Config, sizes: Sequence[int], deadline: float) -> tuple[dict[int, Timed], Memory]:
    """By sequences in a step. `config`'s ramp must have the sizes. Raises RankFailed."""
    plan = make_plan(config)
    local.preload(__name__)
    results = local.run(_rank, config.parallel.world, plan, tuple(sizes), deadline=deadline, device=config.run.device)
    memory = max((memory for _, memory in results), key=lambda memory: memory.peak)
    return results[0][0], memory


def _rank(rank: int, plan: RunPlan, sizes: tuple[int, ...]) -> tuple[dict[int, Timed], Memory]:
    config, cuda = plan.config, plan.config.run.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    rig = make_rig(plan, mesh_of(plan, device), open_data(config))
    if cuda:
        # Ranks are started with one, and an update in host memory takes what it is given.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        rehearse(rig)
    state, first, found = _allocated(cuda), 0, {}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for size in sizes:
        found[size], first = _steps(rig, size, first)
    predicted = held_bytes(plan, cuda)[rig.mesh.pp_rank]
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return found, Memory(peak, state, predicted)


def _allocated(cuda: bool) -> int:
    return torch.cuda.memory_allocated() if cuda else 0


def _steps(rig: Rig, size: int, first: int) -> tuple[Timed, int]:
    """Its figures, and the number of the next sequence."""
    seconds, figures = [], []
    for step in range(WARM + STEPS):
        point = Point(step, first, size, rig.config.data.seq_len)
        first += size
        rig.mesh.sum(torch.zeros(1, device=rig.mesh.device), "start of a step")
        if rig.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        outcome = train_step(rig, point)
        took = time.perf_counter() - began
        figures.append(reduce_figures(rig, outcome.played, took, False))
        seconds.append(figures[-1].maxima.seconds)
    timeline = gather_timeline(rig.plan.training[size].schedule, outcome.played, rig.mesh)
    last, middle = figures[WARM:], median(seconds[WARM:])
    return Timed(
        seconds=middle,
        tokens_per_second=point.tokens / middle,
        bubble=median(f.maxima.idle_share for f in last),
        exposed=median(f.mean_exposed for f in last),
        played=median(f.maxima.played for f in last),
        over_simulated=_over_simulated(timeline, rig.mesh),
        timeline=timeline,
    ), first


def _over_simulated(timeline: Timeline | None, mesh: Mesh) -> float:
    if timeline is None:
        return 0.0
    return timeline.span / simulated_again(timeline).span
