"""What a microbatch of DeepSeek-V3 keeps from F to B, in BF16 and in FP8: predicted, and on a GPU measured.

    python -m benchmarks.model.memory                  # the prediction: a table of every tensor, each rank of the run
    python -m benchmarks.model.memory --device cuda    # and a dense and a MoE layer of V3, measured

The layers are those of configs/deepseek_v3_671b.toml with its recompute, one sequence of 4096 tokens, experts as rank 0
of EP64 holds them (see layer.py). The measured figure is what one more forward adds to the allocator while another
microbatch is in flight, so that what all microbatches share is there already; beside it, a census of the storages left.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.support.census import Census
from benchmarks.support.moe_layer import CONFIG, EP, RECIPES, Mirror, Recipe, fill
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.mesh import Layout, make_mesh
from dryvine.parallel.stage import Flight, Stage, State
from dryvine.trainer.activations import stage_bytes
from dryvine.trainer.config import load
from dryvine.trainer.fp8.choose import choose_engines
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.recipe import preset
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.memory import MicrobatchSize, SavedTensor, saved_bytes, saved_tensors
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.run_plan import RunPlan, make_plan

BLOCKS = ("layers.0", "layers.3", "head", "mtp.0")  # V3's first three layers are dense
MEASURED = ("layers.0", "layers.3")


# ---- predicted


def show_rows(console: Console, shape: Shape, name: str, batch: MicrobatchSize) -> None:
    """Every tensor that one block keeps, by recipe."""
    sizes_of: dict[tuple[str, str, str], dict[str, int]] = {}
    for recipe in RECIPES:
        for row in saved_tensors(shape, preset(recipe), (name,), batch):
            sizes_of.setdefault((row.phase, row.what, row.reader), {})[recipe] = row.bytes
    table = Table("phase", "kept", "for", *(f"{recipe}, MB" for recipe in RECIPES), title=f"{name} of V3")
    for key, sizes in sizes_of.items():
        table.add_row(*key, *(f"{sizes[recipe] / 1e6:.2f}" if recipe in sizes else "-" for recipe in RECIPES))
    table.add_section()
    sums = [sum(sizes.get(recipe, 0) for sizes in sizes_of.values()) for recipe in RECIPES]
    table.add_row("", "all", "", *(f"{size / 1e6:.2f}" for size in sums))
    console.print(table)


def by_rank(plan: RunPlan) -> list[dict[str, float]]:
    """Peak GB that the microbatches in flight on each pipeline rank keep, by recipe."""
    config, ranks = plan.config, plan.config.parallel.pp
    configs = {recipe: config.model_copy(update={"fp8": preset(recipe)}) for recipe in RECIPES}
    sizes = {recipe: stage_bytes(replace(plan, config=changed), cuda=True) for recipe, changed in configs.items()}
    return [{r: plan.footprint.most_held(rank, sizes[r]) / 1e9 for r in RECIPES} for rank in range(ranks)]


def show_ranks(console: Console, plan: RunPlan, ranks: list[dict[str, float]]) -> None:
    p = plan.config.parallel
    title = f"{p.schedule}, {p.pp} ranks, {plan.schedule.microbatches} microbatches: peak GB kept"
    table = Table("", *(str(rank) for rank in range(p.pp)), title=title)
    for recipe in RECIPES:
        table.add_row(recipe, *(f"{rank[recipe]:.1f}" for rank in ranks))
    console.print(table)


# ---- measured


@dataclass
class Bench:
    stage: Stage
    tokens: torch.Tensor
    x: torch.Tensor

    def forward(self) -> Flight:
        """The stage's input is a new tensor each time, as one from a wire would be."""
        flight = Flight(self.tokens, 1.0)
        state: State = (self.x.clone(),)
        for phase in self.stage.phases:
            state = phase.forward(state, flight).wait()
        return flight

    def measure(self) -> tuple[int, int]:
        """Bytes that one flight adds to the allocator (0 on a CPU), and those of the storages it leaves."""
        other = self.forward()
        before = _allocated(self.x.device)
        flight = self.forward()
        added = _allocated(self.x.device) - before
        with Census() as census:
            third = self.forward()
        left = census.bytes
        del other, flight, third
        return added, left


def _allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def make_bench(shape: Shape, recipe: Recipe, name: str, batch: MicrobatchSize, device: torch.device) -> Bench:
    fp8 = None
    if recipe != "bf16":
        mesh = make_mesh(Layout(), device, timedelta(seconds=60))
        with tempfile.TemporaryDirectory() as folder:
            fp8 = FP8(preset(recipe), *choose_engines(preset(recipe), mesh, Path(folder)))
    spec = Spec(shape, torch.bfloat16, device, 0, EP, fp8)
    model = Model(spec, {0: (name,)}, Flat(Mirror(EP), shape.routed))
    fill(model)
    tokens = torch.zeros(1, batch.tokens + 1 + shape.mtp_depth, dtype=torch.int64, device=device)
    return Bench(model.stages[0], tokens, torch.randn(batch.tokens, shape.hidden, device=device).bfloat16())


def compare(shape: Shape, batch: MicrobatchSize, device: torch.device) -> list[dict[str, Any]]:
    results = []
    for name in MEASURED:
        for recipe in RECIPES:
            bench = make_bench(shape, recipe, name, batch, device)
            bench.forward()  # makes what all microbatches share
            added, left = bench.measure()
            predicted = saved_bytes(shape, preset(recipe), (name,), batch)
            results.append(
                {"block": name, "recipe": recipe, "predicted": predicted, "allocated": added, "census": left}
            )
            del bench
    return results


def show_measured(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table("block", "recipe", "predicted, MB", "allocator, MB", "census, MB", "predicted / census")
    for one in results:
        sizes = (f"{one[key] / 1e6:.2f}" for key in ("predicted", "allocated", "census"))
        table.add_row(one["block"], one["recipe"], *sizes, f"{one['predicted'] / one['census']:.4f}")
    console.print(table)


def narrow(shape: Shape) -> Shape:
    """For a CPU: V3's layers and experts at widths that take seconds."""
    changes = {"hidden": 128, "ffn": 256, "expert_ffn": 128, "heads": 2, "q_lora": 64, "kv_lora": 64, "nope_dim": 32,
               "rope_dim": 16, "v_dim": 32, "vocab": 512}  # fmt: skip
    return shape.model_copy(update=changes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("none", "cpu", "cuda"), default="none", help="measure there; cpu: narrow")
    parser.add_argument("--no-recompute", action="store_true", help="as if the config recomputed nothing")
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args()
    config, console = load(CONFIG), Console(width=140)
    if options.no_recompute:
        config = config.model_copy(update={"model": config.model.model_copy(update={"recompute": ()})})
    shape, length = config.model, config.data.seq_len
    batch = MicrobatchSize(length, 1)
    for name in BLOCKS:
        show_rows(console, shape, name, batch)
    plan = make_plan(config)
    ranks = by_rank(plan)
    show_ranks(console, plan, ranks)
    rows: dict[str, list[SavedTensor]] = {r: list(saved_tensors(shape, preset(r), BLOCKS, batch)) for r in RECIPES}
    measured = []
    if options.device != "none":
        device = torch.device(options.device)
        if device.type == "cpu":
            shape, batch = narrow(shape), MicrobatchSize(64, 1, cuda=False)
        measured = compare(shape, batch, device)
        show_measured(console, measured)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "ranks": ranks, "measured": measured}, indent=1))
    return 0 if all(abs(one["predicted"] / one["census"] - 1) < 0.02 for one in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
