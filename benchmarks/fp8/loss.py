"""Does FP8 cost loss? The recipe's own promise (arXiv 2412.19437, section 3.3: under 0.25%), measured and drawn.

    python -m benchmarks.fp8.loss [--device cuda] [--jobs N] [--out runs/fp8_loss] [--figure docs/fp8_loss]

Trains one small MoE (loss.toml) on the embedded corpus in BF16 and in FP8 from three seeds each, in FP32 once, and
with two choices that the recipe warns of; same seed, same data. Every run is `python -m dryvine.trainer` with
overrides, `--jobs` of them at a time: they go on from their checkpoints, so this may be stopped and started at will
(hours on a CPU). The gap is that of the loss averaged over the last `WINDOW` steps, to BF16 of the same seed.

A loss that forgives everything would prove nothing. So the same script takes inputs and output gradients of every
Linear out of a trained BF16 model and compares dX and dW under each choice with FP64: there the bad choices must show.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from dryvine.trainer import run_rows
from dryvine.trainer.begin import resume
from dryvine.trainer.config import load
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.fp8.engines.emulate import Emulate
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.linear import FP8Linear
from dryvine.trainer.fp8.recipe import Recipe, preset
from dryvine.trainer.model.linear import Linear
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import make_rig, mesh_of
from dryvine.trainer.run_plan import load_plan
from dryvine.trainer.step import accumulate
from dryvine.trainer.tensors.weight import Weight

mpl.use("svg")
from matplotlib import pyplot as plt

CONFIG = Path(__file__).with_suffix(".toml")
WINDOW = 100  # steps
DRAWN = 5  # every so many steps
GOAL = 0.0025
RECIPES: dict[str, tuple[str, ...]] = {  # name -> overrides
    "bf16": (),
    "fp8": ("fp8.preset=deepseek_v3",),
    "fp32": ("run.dtype=fp32", "fp8.preset=fp32"),
    "fp8, gradients in 128x128": ("fp8.preset=deepseek_v3", "fp8.gradient_tile=128x128"),
    "fp8, one scale a tensor": (
        "fp8.preset=deepseek_v3", "fp8.activation_tile=tensor", "fp8.gradient_tile=tensor", "fp8.weight_tile=tensor",
    ),
}  # fmt: skip
SEEDS = {"fp32": 1}
CHOICES: dict[str, Recipe] = {  # compared with FP64 on tensors of a run
    "the recipe": preset("deepseek_v3"),
    "power-of-two scales": preset("deepseek_v3", scales="ue8m0"),
    "gradients in 128x128": preset("deepseek_v3", gradient_tile="128x128"),
    "one scale a tensor": preset("deepseek_v3", activation_tile="tensor", gradient_tile="tensor", weight_tile="tensor"),
    "14-bit sums, promoted every 128": preset("deepseek_v3", accumulator="hopper"),
    "14-bit sums, never promoted": preset("deepseek_v3", accumulator="hopper", promotion=0),
}


@dataclass(frozen=True)
class Run:
    recipe: str
    seed: int
    folder: Path

    @property
    def losses(self) -> NDArray[np.float64]:
        return np.array([row["loss"] for row in run_rows.read(self.folder)], dtype=np.float64)


def every_run(out: Path, seeds: int) -> list[Run]:
    return [
        Run(recipe, seed, out / f"{recipe.replace(' ', '_').replace(',', '')}-{seed}")
        for recipe in RECIPES
        for seed in range(min(seeds, SEEDS.get(recipe, seeds)))
    ]


# ---- training


def train(run: Run, steps: int, device: str, threads: int) -> None:
    gemm = "triton" if device == "cuda" else "emulate"  # named, since times taken beside other runs mean nothing
    words = [
        sys.executable, "-m", "dryvine.trainer", str(CONFIG), f"run.out={run.folder.parent}",
        f"run.name={run.folder.name}", f"run.seed={run.seed + 1}", f"run.steps={steps}", f"run.device={device}",
        f"fp8.gemm={gemm}", *RECIPES[run.recipe],
    ]  # fmt: skip
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{run.recipe}, seed {run.seed}: exit {done.returncode}\n{done.stderr[-2000:]}")


def train_all(runs: Sequence[Run], steps: int, device: str, jobs: int) -> None:
    open_data(load(CONFIG))
    left = [run for run in runs if len(run.losses) < steps]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool, Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("steps", total=steps * len(runs))
        started = [pool.submit(train, run, steps, device, threads) for run in left]
        while not all(future.done() for future in started):
            bar.update(task, completed=sum(len(run.losses) for run in runs))
            time.sleep(2)
    for future in started:
        future.result()


# ---- what it cost


def smooth(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.convolve(losses, np.full(WINDOW, 1 / WINDOW), mode="valid")


def gap(losses: NDArray[np.float64], base: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of smoothed losses, at the steps that both runs have."""
    both = min(len(losses), len(base))
    return smooth(losses[:both]) / smooth(base[:both]) - 1


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Final smoothed loss of each run, its gap to BF16 of the same seed, and how far seeds lie apart."""
    losses = {(run.recipe, run.seed): run.losses for run in runs}
    base = [float(smooth(some)[-1]) for (recipe, _), some in losses.items() if recipe == "bf16"]
    gaps: dict[str, list[float]] = {}
    for (recipe, seed), some in losses.items():
        gaps.setdefault(recipe, []).append(float(gap(some, losses["bf16", seed])[-1]))
    return {
        "steps": {f"{recipe}, seed {seed}": len(some) for (recipe, seed), some in losses.items()},
        "losses": {f"{recipe}, seed {seed}": float(smooth(some)[-1]) for (recipe, seed), some in losses.items()},
        "gaps": gaps,
        "gap": {recipe: statistics.mean(some) for recipe, some in gaps.items()},
        "seed_spread": (max(base) - min(base)) / statistics.mean(base),
    }


def draw(runs: Sequence[Run], errors: dict[str, dict[str, float]], path: Path) -> None:
    results = {(run.recipe, run.seed): run.losses for run in runs}
    colours = dict(zip(RECIPES, ("tab:gray", "tab:blue", "black", "tab:orange", "tab:red"), strict=True))
    figure, (above, below, bars) = plt.subplots(3, 1, figsize=(8, 10), height_ratios=(3, 3, 2.4), layout="constrained")
    for (recipe, seed), losses in results.items():
        label = recipe if seed == 0 else None
        for axis, line in ((above, smooth(losses)), (below, 100 * gap(losses, results["bf16", seed]))):
            if axis is above or recipe != "bf16":
                steps = np.arange(len(line)) + WINDOW
                axis.plot(steps[::DRAWN], line[::DRAWN], color=colours[recipe], lw=0.9, label=label)
    base = np.stack([smooth(losses) for (recipe, _), losses in results.items() if recipe == "bf16"])
    spread = 100 * (base / base.mean(0) - 1)
    steps = np.arange(base.shape[1]) + WINDOW
    below.fill_between(steps, spread.min(0), spread.max(0), color="tab:gray", alpha=0.25, label="seeds of bf16")
    for sign in (-1, 1):
        below.axhline(sign * 100 * GOAL, color="tab:green", ls="--", lw=0.9, label="goal" if sign > 0 else None)
    above.set_yscale("log")
    above.set_ylabel(f"loss, mean of {WINDOW} steps")
    below.set_ylabel("to bf16 of the same seed, %")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.legend(fontsize=8)
    places = np.arange(len(errors))
    for i, (kind, label) in enumerate(KINDS.items()):
        sizes = [100 * error[kind] for error in errors.values()]
        bars.barh(places + 0.2 * (i - 1.5), sizes, 0.2, label=label)
    bars.set_yticks(places, list(errors))
    bars.invert_yaxis()
    bars.set_xscale("log")
    bars.set_xlabel("relative error on tensors of a trained model, %, median over Linears")
    bars.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.22), ncols=4)
    figure.savefig(path)


# ---- the choices on tensors of a run


@dataclass
class Taken:
    """What one Linear of a trained model saw: x [N, I], W [O, I], dL/dy [N, O]."""

    name: str
    x: Tensor
    weight: Tensor
    dy: Tensor


def take(folder: Path, seed: int, device: str) -> tuple[int, list[Taken]]:
    """From one training microbatch after the last checkpoint of a BF16 run, and the steps that run had done."""
    run = (f"run.out={folder.parent}", f"run.name={folder.name}", f"run.seed={seed + 1}", f"run.device={device}")
    plan = load_plan(CONFIG, run)
    config = plan.config
    rig = make_rig(plan, mesh_of(plan, torch.device(device)), open_data(config))
    done = resume(rig, Console(stderr=True))
    taken: list[Taken] = []

    def watch(name: str, module: Linear) -> None:
        def seen(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                x, weight = inputs[0].detach(), module.weight.detach()
                output.register_hook(lambda dy: taken.append(Taken(name, x, weight, dy.detach())))

        module.register_forward_hook(seen)

    for name, module in rig.model.root.named_modules():
        if isinstance(module, Linear) and name != "head":
            watch(name, module)
    accumulate(rig, next(islice(points(config.batch, config.data.seq_len), done, None)))
    return done, taken


def products(taken: Taken, recipe: Recipe) -> dict[str, Tensor]:
    """dX and dW as the recipe has them, emulated; FP32 results, so that only quantisation and sums show."""
    fp8 = FP8(recipe, Emulate(recipe.accumulator, recipe.promotion), "")
    x, weight = taken.x.float().requires_grad_(), Weight(taken.weight.float())
    FP8Linear(weight, fp8)(x).backward(taken.dy.float())
    assert x.grad is not None
    return {"dX": x.grad, "dW": weight.gradient()}


def apart(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def of_the_worst_rows(value: Tensor, truth: Tensor) -> float:
    """The relative error that 99% of the rows stay under. The error of the whole is that of its largest rows."""
    size = truth.norm(dim=1)
    return float(((value.double() - truth).norm(dim=1) / size)[size > 0].quantile(0.99))


KINDS = {
    "dX": "of dX",
    "dW": "of dW",
    "token": "of dX, 99th percentile of tokens",
    "sums": "of dW from sums alone",
}


def errors(all_taken: Sequence[Taken]) -> dict[str, dict[str, float]]:
    """Choice -> kind of relative error -> the median over Linears. The truth is FP64; `sums` compares with FP32 sums of
    the same quantised operands."""
    results: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in CHOICES}
    for taken in all_taken:
        x, weight, dy = taken.x.double(), taken.weight.double(), taken.dy.double()
        for name, recipe in CHOICES.items():
            ours, exact = products(taken, recipe), products(taken, recipe.model_copy(update={"accumulator": "fp32"}))
            for kind, error in {
                "dX": apart(ours["dX"], dy @ weight),
                "dW": apart(ours["dW"], dy.t() @ x),
                "token": of_the_worst_rows(ours["dX"], dy @ weight),
                "sums": apart(ours["dW"], exact["dW"].double()),
            }.items():
                results[name][kind].append(error)
    return {name: {kind: statistics.median(some) for kind, some in kinds.items()} for name, kinds in results.items()}


# ---- the whole


def rows(results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for recipe, gaps in results["gaps"].items():
        yield recipe, f"{100 * results['gap'][recipe]:+.3f}%", ", ".join(f"{100 * gap:+.3f}%" for gap in gaps)


def say(results: dict[str, Any]) -> None:
    table = Table("recipe", "gap to bf16", "by seed", title=f"loss over the last {WINDOW} steps")
    for row in rows(results):
        table.add_row(*row)
    choices = Table("choice", *KINDS.values(), title=f"relative error, median of {results['linears']} Linears")
    for name, error in results["errors"].items():
        choices.add_row(name, *(f"{100 * error[kind]:.3f}%" for kind in KINDS))
    console = Console(width=110)
    console.print(table, f"seeds of bf16 lie {100 * results['seed_spread']:.2f}% apart", choices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_loss"))
    parser.add_argument("--figure", type=Path, help="write FIGURE.svg and FIGURE.json")
    parser.add_argument("--look", action="store_true", help="train nothing: what there is, at the steps both runs have")
    asked = parser.parse_args()
    runs = every_run(asked.out, asked.seeds)
    if not asked.look:
        train_all(runs, asked.steps, asked.device, asked.jobs)
    done, taken = take(next(run.folder for run in runs if run.recipe == "bf16"), 0, asked.device)
    device = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    results = {
        "device": device,
        "torch": torch.__version__,
        **summary(runs),
        "taken_after": done,
        "linears": len(taken),
        "errors": errors(taken),
    }
    say(results)
    if asked.figure:
        asked.figure.with_name(f"{asked.figure.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(runs, results["errors"], asked.figure.with_name(f"{asked.figure.name}.svg"))


if __name__ == "__main__":
    main()
