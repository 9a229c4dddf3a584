"""`dryvine verify`: compares training in the configured layout with training in one process.

The same model, data and seed are trained for a few steps in FP32, once on one rank without pipeline or expert
parallelism and once in the configured layout: on CPU ranks of this machine, on its GPUs, or on the ranks that torchrun
started. Losses, gradient norms, all summed gradients and all weights are compared. The alternative, to compare training
curves, hides a missing gradient for a thousand steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
import torch.distributed as dist
from rich.console import Console

from dryvine.comm import local
from dryvine.comm.topology import TopologyConfig, discover
from dryvine.comm.world import backend, set_environment
from dryvine.parallel.config import ParallelConfig
from dryvine.trainer.config import Config
from dryvine.trainer.deviations import Deviation, RankRun, Run, assembled, deviations, table
from dryvine.trainer.fits import check_host
from dryvine.trainer.ramps import gradient_scale, points
from dryvine.trainer.rehearse import rehearse, report_loads
from dryvine.trainer.rig import make_rig, mesh_of
from dryvine.trainer.run_plan import RunPlan, make_plan
from dryvine.trainer.sources import open_sources
from dryvine.trainer.step import balance, bias_gamma, gradients, update

STEPS = 3
AGAINST_ONE = f"this layout against one process: |a - b| / |a|, FP32, {STEPS} steps"
TWICE = f"this layout against itself, in its own dtypes: |a - b| / |a|, {STEPS} steps"


def run(config: Config, device: str, console: Console) -> bool:
    """Print the deviations. Returns whether all are within their tolerance. Raises ConfigError if this host is to
    start ranks that it cannot hold."""
    for layout in () if dist.is_torchelastic_launched() else (alone(config), in_fp32(config)):
        check_host(layout, device)
    with _world(device) as rank:
        against_one = compare(config, device)
        twice = repeat(config, device) if device == "cuda" else []
        if rank == 0:
            console.print(table(against_one, AGAINST_ONE))
            if twice:
                console.print(table(twice, TWICE))
    return all(d.fine for d in against_one + twice)


@contextmanager
def _world(device: str) -> Iterator[int]:
    """Join the world that torchrun started, if it did. Yields this process's rank, 0 without torchrun."""
    if not dist.is_torchelastic_launched():
        yield 0
        return
    if device == "cuda":
        set_environment(os.environ)
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend(device))
    yield dist.get_rank()
    dist.destroy_process_group()


def compare(config: Config, device: str = "cpu") -> list[Deviation]:
    """Run both layouts in FP32 and compare them. Raises RankFailed if a rank fails. Under torchrun all ranks call this
    and get the same result."""
    return deviations(play(alone(config), device), play(in_fp32(config), device))


def repeat(config: Config, device: str = "cpu") -> list[Deviation]:
    """Run the layout twice in its own dtypes and compare bitwise. This detects races: a message that is read too early
    rarely has the same values twice."""
    return deviations(play(config, device), play(config, device), tolerance=0.0)


def in_fp32(config: Config) -> Config:
    """The same run in FP32, without FP8."""
    run, fp8 = config.run.model_copy(update={"dtype": "fp32"}), type(config.fp8)()
    return config.model_copy(update={"run": run, "fp8": fp8})


def alone(config: Config) -> Config:
    """The same training in one process: one rank, one stage, the same microbatch size."""
    one = ParallelConfig(microbatch_sequences=config.parallel.microbatch_sequences)
    comm = config.comm.model_copy(update={"topology": TopologyConfig()})
    return in_fp32(config).model_copy(update={"parallel": one, "comm": comm})


def play(config: Config, device: str = "cpu", steps: int = STEPS) -> Run:
    """Train `steps` steps and join the pieces of all ranks."""
    open_sources(config)
    plan = make_plan(config)
    parts = _in_this_world(plan, steps, device) if dist.is_initialized() else _started(plan, steps, device)
    losses = tuple(map(sum, zip(*(part.losses for part in parts), strict=True)))
    grads, weights = assembled([part.grads for part in parts]), assembled([part.weights for part in parts])
    return Run(losses, parts[0].norms, grads, weights)


def _started(plan: RunPlan, steps: int, device: str) -> list[RankRun]:
    """On ranks that are started for this call."""
    local.preload(__name__)
    world, deadline = plan.config.parallel.world, plan.config.comm.deadline
    return local.run(_rank, world, plan, steps, device, deadline=deadline, device=device)


def _in_this_world(plan: RunPlan, steps: int, device: str) -> list[RankRun]:
    """On the first ranks of this process's world; every rank gets the results."""
    ranks = plan.config.parallel.world
    parts: list[RankRun | None] = [None] * dist.get_world_size()
    own = _rank(dist.get_rank(), plan, steps, device) if dist.get_rank() < ranks else None
    dist.all_gather_object(parts, own)
    return [part for part in parts if part is not None]


def _rank(rank: int, plan: RunPlan, steps: int, device: str) -> RankRun:
    config = plan.config
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    asked = config.comm.topology  # nodes that are not given are not looked for: these ranks may share a host
    topology = discover(config.parallel.world, asked, {}) if asked.nodes else None
    rig = make_rig(plan, mesh_of(plan, where), open_sources(config), topology)
    if device == "cuda":
        rehearse(rig)
        report_loads(rank)
    losses, norms, grads = [], [], {}
    for point in islice(points(config.batch, config.data.seq_len), steps):
        scale = gradient_scale(point)
        played, norm, _ = gradients(rig, point)
        norms.append(norm)
        # Copied before the update, which clips them in place.
        grads = {(p.name, p.start): (p.grad / scale).cpu().numpy() for p in rig.optimizer.pieces}
        update(rig, point, norms[-1])
        balance(rig, bias_gamma(config, point))
        microbatches = plan.training[point.sequences].schedule.microbatches * rig.mesh.data_ranks
        losses.append(sum(float(loss) for some in played.losses.values() for loss in some) / microbatches)
    rig.optimizer.zero.settle()
    weights = {(p.name, p.start): p.master.cpu().numpy() for p in rig.optimizer.pieces}
    return RankRun(tuple(losses), tuple(norms), grads, weights)
