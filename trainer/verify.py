"""Does this layout train like one process? The first promise of the project, as a command.

The same model, data and seed take a few steps in FP32, once on one rank without pipeline or expert parallelism and
once in the layout asked for: on CPU ranks of this machine, on its GPUs, or on the ranks that torchrun started. Compared
are the loss, the gradient norm, every summed
gradient and every weight; the deviation of a tensor is |a - b| / |a| in the L2 norm, taken in FP64. A training curve
that looks the same would be the alternative, and it hides a missing gradient for a thousand steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dryvine.comm import local
from dryvine.comm.world import backend, prepare
from dryvine.parallel.config import ParallelConfig
from dryvine.trainer.config import Config
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.ramps import gradient_scale, points
from dryvine.trainer.rehearse import rehearse
from dryvine.trainer.rig import make_rig, mesh_of
from dryvine.trainer.run_plan import RunPlan, make_plan
from dryvine.trainer.step import accumulate, balance, update

STEPS = 3
COMPARED = ("gradient", "weight")
TOLERANCE = 1e-5  # relative, in FP32

AGAINST_ONE = f"this layout against one process: |a - b| / |a|, FP32, {STEPS} steps"
TWICE = f"this layout against itself, in its own dtypes: |a - b| / |a|, {STEPS} steps"

Whole = dict[str, NDArray[np.float32]]  # parameter -> all its elements, flat
Part = dict[tuple[str, int], NDArray[np.float32]]  # (parameter, first element) -> what one rank owns


@dataclass(frozen=True)
class Run:
    """What a layout computed: per step the loss and gradient norm; gradients of the last step; weights after it."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    grads: Mapping[str, NDArray[np.float32]]
    weights: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Deviation:
    """The largest relative deviation among the tensors of a kind, and which tensor has it."""

    kind: str
    largest: float
    where: str
    tolerance: float = TOLERANCE

    @property
    def fine(self) -> bool:
        return self.largest <= self.tolerance  # False for NaN


def run(config: Config, device: str, console: Console) -> bool:
    """Print the deviations. Returns whether all are within their tolerance."""
    with _world(device) as rank:
        against_one = compare(config, device)
        twice = repeat(config, device) if device == "cuda" else []
        if rank == 0:
            console.print(table(against_one))
            if twice:
                console.print(table(twice, TWICE))
    return all(d.fine for d in against_one + twice)


@contextmanager
def _world(device: str) -> Iterator[int]:
    """The ranks that torchrun started, if it did. Yields this process's number among them."""
    if not dist.is_torchelastic_launched():
        yield 0
        return
    if device == "cuda":
        prepare(os.environ)
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend(device))
    yield dist.get_rank()
    dist.destroy_process_group()


def compare(config: Config, device: str = "cpu") -> list[Deviation]:
    """Run both layouts in FP32 and compare them. Raises RankFailed if a rank fails. Where torchrun started ranks, all
    of them call this and have the same answer."""
    return deviations(play(alone(config), device), play(in_fp32(config), device))


def repeat(config: Config, device: str = "cpu") -> list[Deviation]:
    """Run the layout twice in its own dtypes and compare the bits: a message that is read too early is seldom early by
    the same amount twice."""
    return deviations(play(config, device), play(config, device), tolerance=0.0)


def in_fp32(config: Config) -> Config:
    """The same run in FP32, without FP8."""
    run, fp8 = config.run.model_copy(update={"dtype": "fp32"}), type(config.fp8)()
    return config.model_copy(update={"run": run, "fp8": fp8})


def alone(config: Config) -> Config:
    """The same training in one process: one rank, one stage, the same microbatch size."""
    one = ParallelConfig(microbatch_sequences=config.parallel.microbatch_sequences)
    return in_fp32(config).model_copy(update={"parallel": one})


def play(config: Config, device: str = "cpu", steps: int = STEPS) -> Run:
    """Train `steps` steps and put the pieces of all ranks together."""
    open_data(config)
    plan = make_plan(config)
    parts = _joined(plan, steps, device) if dist.is_initialized() else _started(plan, steps, device)
    losses = tuple(float(sum(part[0][i] for part in parts)) for i in range(steps))
    return Run(losses, parts[0][1], _whole([part[2] for part in parts]), _whole([part[3] for part in parts]))


RankResult = tuple[list[float], tuple[float, ...], Part, Part]


def _started(plan: RunPlan, steps: int, device: str) -> list[RankResult]:
    """On ranks that are started here and end here."""
    local.preload(__name__)
    world, deadline = plan.config.parallel.world, plan.config.comm.deadline
    return local.run(_rank, world, plan, steps, device, deadline=deadline, device=device)


def _joined(plan: RunPlan, steps: int, device: str) -> list[RankResult]:
    """On the first ranks of the world that this process belongs to; every rank has the results."""
    ranks = plan.config.parallel.world
    parts: list[RankResult | None] = [None] * dist.get_world_size()
    own = _rank(dist.get_rank(), plan, steps, device) if dist.get_rank() < ranks else None
    dist.all_gather_object(parts, own)
    return [part for part in parts if part is not None]


def _rank(rank: int, plan: RunPlan, steps: int, device: str) -> RankResult:
    config = plan.config
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    rig = make_rig(plan, mesh_of(plan, where), open_data(config))
    if device == "cuda":
        rehearse(rig)
    losses, norms, grads = [], [], {}
    for point in islice(points(config.batch, config.data.seq_len), steps):
        played = accumulate(rig, point)
        scale = gradient_scale(point)
        norms.append(rig.optimizer.reduce(scale))
        grads = {(p.name, p.start): (p.grad / scale).cpu().numpy() for p in rig.optimizer.pieces}
        update(rig, point, norms[-1])
        balance(rig)
        microbatches = plan.training[point.sequences].schedule.microbatches * rig.mesh.data_ranks
        losses.append(sum(float(loss) for some in played.losses.values() for loss in some) / microbatches)
    return losses, tuple(norms), grads, {(p.name, p.start): p.master.cpu().numpy() for p in rig.optimizer.pieces}


def _whole(parts: list[Part]) -> Whole:
    """Each parameter from its pieces. Every element must be owned once; an overlap or a gap would not line up."""
    found: dict[str, list[tuple[int, NDArray[np.float32]]]] = {}
    for part in parts:
        for (name, start), values in part.items():
            found.setdefault(name, []).append((start, values))
    out = {}
    for name, pieces in found.items():
        pieces.sort(key=lambda piece: piece[0])
        ends = [0, *(start + len(values) for start, values in pieces)]
        if [start for start, _ in pieces] != ends[:-1]:
            raise AssertionError(f"{name}: its pieces do not cover it once: {[(s, len(v)) for s, v in pieces]}")
        out[name] = np.concatenate([values for _, values in pieces])
    return out


def deviations(one: Run, many: Run, tolerance: float = TOLERANCE) -> list[Deviation]:
    """The largest deviation of each kind of tensor, dearest kinds first."""
    steps = [f"step {i + 1}" for i in range(len(one.losses))]
    found = [
        _worst("loss", dict(zip(steps, map(_relative, one.losses, many.losses), strict=True))),
        _worst("gradient norm", dict(zip(steps, map(_relative, one.norms, many.norms), strict=True))),
    ]
    for what, left, right in (("gradient", one.grads, many.grads), ("weight", one.weights, many.weights)):
        if left.keys() != right.keys():
            raise AssertionError(f"the layouts hold other parameters: {sorted(left.keys() ^ right.keys())}")
        kinds: dict[str, dict[str, float]] = {}
        for name in left:
            kinds.setdefault(_kind(name), {})[name] = _relative(left[name], right[name])
        found += [_worst(f"{what} {kind}", kinds[kind]) for kind in sorted(kinds)]
    return [replace(deviation, tolerance=tolerance) for deviation in found]


def _kind(name: str) -> str:
    """layers.3.attention.q_a.weight and layers.4.attention.q_a.weight are of one kind."""
    return re.sub(r"\.\d+\.", ".N.", name)


def _relative(one: float | NDArray[np.float32], many: float | NDArray[np.float32]) -> float:
    a, b = np.asarray(one, np.float64), np.asarray(many, np.float64)
    return float(np.linalg.norm(a - b) / (np.linalg.norm(a) or 1.0))


def _worst(kind: str, found: Mapping[str, float]) -> Deviation:
    where = max(found, key=lambda name: (np.isnan(found[name]), found[name]))
    return Deviation(kind, found[where], where)


def table(found: list[Deviation], title: str = AGAINST_ONE) -> Table:
    """A row per kind of tensor, its gradient's and its weight's deviation side by side."""
    rows: dict[str, dict[str, Deviation]] = {}
    for d in found:
        what, _, kind = d.kind.partition(" ")
        alone = d.kind in ("loss", "gradient norm")
        rows.setdefault(d.kind if alone else kind, {})[COMPARED[0] if alone else what] = d
    out = Table(title=title)
    out.add_column("what", no_wrap=True)
    for what in COMPARED:
        out.add_column(what, justify="right", no_wrap=True)
    for kind, of in rows.items():
        out.add_row(kind, *(_cell(of.get(what)) for what in COMPARED))
    return out


def _cell(d: Deviation | None) -> str:
    if d is None:
        return ""
    return f"[green]{d.largest:.1e}[/]" if d.fine else f"[bold red]{d.largest:.1e} in {d.where}[/]"
