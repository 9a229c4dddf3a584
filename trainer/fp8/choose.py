"""Which engine multiplies: the one the recipe names, or the fastest on these devices, measured once.

Measured by kind of product, since no engine wins all: cuBLAS has the better dense kernels, the own ones know experts
and add weight gradients in place. A table of winners by GPU would be what this is instead of, and would be wrong by the
next driver. Engines add in different orders, so all ranks take the same one, the fastest on the rank that is slowest
with it: copies of a stage, a DualPipe pair among them, must round alike. The run folder keeps the choice for the same
reason, and a run that goes on takes it again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dryvine.comm.mesh import Mesh
from dryvine.trainer.fp8 import reference
from dryvine.trainer.fp8.gemm import Emulate, Engine, Products, Torch, Triton
from dryvine.trainer.fp8.gemm_deep_gemm import DeepGemm
from dryvine.trainer.fp8.gemm_te import TransformerEngine
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized

if TYPE_CHECKING:
    from dryvine.trainer.fp8.recipe import Recipe

ENGINES: dict[str, Callable[[], Engine]] = {
    "emulate": Emulate,
    "torch": Torch,
    "triton": Triton,
    "deep_gemm": DeepGemm,
    "transformer_engine": TransformerEngine,
}
KINDS = ("dense products", "grouped products", "weight gradients")
KEPT = "fp8_gemm.json"  # in the run folder: the engine of each kind

Times = dict[str, dict[str, float]]  # kind -> engine -> milliseconds
Measure = Callable[[Mapping[str, Engine], torch.device], Times]


class CannotRun(ValueError):
    """The recipe's engine cannot work here; says why, and what would."""


@dataclass(frozen=True)
class Mixed:
    """An engine for each kind of product."""

    dense: Engine
    grouped: Engine
    sums: Engine

    def product(
        self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        return (self.dense if groups is None else self.grouped).product(a, b, groups, dtype)

    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        self.sums.wgrad(a, b, groups, total)


def check(recipe: Recipe, device: torch.device, widths: Sequence[int] = ()) -> None:
    """Raise CannotRun if the engine that the recipe names, or FFNs of these `widths`, cannot work on `device`."""
    name = recipe.gemm
    if not recipe.fp8:
        return
    if name != "auto" and (reason := ENGINES[name]().missing(device)):
        raise CannotRun(f"fp8.gemm = '{name}' {reason}")
    odd = [width for width in widths if width % 128]
    if odd and device.type == "cuda":
        raise CannotRun(f"[fp8] on a GPU: FFN width {odd[0]} is not a multiple of 128; change model.ffn or expert_ffn")


def choose(recipe: Recipe, mesh: Mesh, folder: Path) -> tuple[Products, str]:
    """What multiplies on all ranks, and a line for the log. `folder` is the run's. Raises CannotRun. Collective."""
    check(recipe, mesh.device)
    if recipe.gemm == "emulate":
        return _emulate(recipe), "fp8.gemm: emulate, as asked"
    if recipe.gemm != "auto":
        return ENGINES[recipe.gemm](), f"fp8.gemm: {recipe.gemm}, as asked"
    here = {n: make() for n, make in ENGINES.items() if n != "emulate" and not make().missing(mesh.device)}
    faults = {name: why for name, engine in here.items() if (why := fault(engine, mesh.device))}
    taken, said = agree({n: e for n, e in here.items() if n not in faults}, mesh, folder, milliseconds)
    said += "".join(f"; left out: {name} ({why})" for name, why in faults.items())
    if not taken:
        return _emulate(recipe), f"fp8.gemm: emulate, the one there is on {mesh.device}{said}"
    return Mixed(*(here[taken[kind]] for kind in KINDS)), f"fp8.gemm: {said}"


def agree(able: Mapping[str, Engine], mesh: Mesh, folder: Path, measure: Measure) -> tuple[dict[str, str], str]:
    """The engine of each kind, among those that every rank can run, and why. None, if there is no such engine: all of
    them then emulate. Collective; rank 0 reads and writes the folder."""
    found = cast(list[tuple[set[str], dict[str, str]]], mesh.gather((set(able), _kept(folder, mesh.rank))))
    common = set.intersection(*(names for names, _ in found))
    lacking = sorted(set.union(*(names for names, _ in found)) - common)
    note = f" (not on every rank: {', '.join(lacking)})" if lacking else ""
    if not common:
        return {}, note
    kept = found[0][1]
    if kept.keys() == set(KINDS) and set(kept.values()) <= common:
        return kept, "; ".join(f"{kind} {kept[kind]}" for kind in KINDS) + f", as {KEPT} of this run has it{note}"
    names = [name for name in able if name in common]
    times = measure({name: able[name] for name in names}, mesh.device)
    rows = torch.tensor([[times[kind][name] for name in names] for kind in KINDS], device=mesh.device)
    slowest = [dict(zip(names, row, strict=True)) for row in mesh.max(rows).tolist()]
    taken = {kind: min(row, key=row.__getitem__) for kind, row in zip(KINDS, slowest, strict=True)}
    if mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KEPT).write_text(json.dumps(taken, indent=1) + "\n")
    return taken, "; ".join(_line(kind, taken[kind], row) for kind, row in zip(KINDS, slowest, strict=True)) + note


def _kept(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / KEPT
    return json.loads(path.read_text()) if rank == 0 and path.exists() else {}


def _line(kind: str, best: str, row: Mapping[str, float]) -> str:
    return f"{kind} {best} (" + ", ".join(f"{name} {ms:.2f} ms" for name, ms in row.items()) + ")"


def _emulate(recipe: Recipe) -> Emulate:
    return Emulate(recipe.accumulator, recipe.promotion)


def fault(engine: Engine, device: torch.device) -> str | None:
    """Why its results are not to be used: it raises, or is not within 1% of emulation on a small product of each kind.
    Packages change, and a run that trusted one would learn of it from its loss."""
    groups = ExpertGroups((100, 0, 28, 136), device)
    x, dy = (torch.randn(groups.rows, width, device=device) for width in (256, 384))
    (a, a_turned), dy_turned = reference.quantize_both(x, groups), reference.quantize_columns(dy, groups)
    w = reference.quantize_blocks(torch.randn(4, 384, 256, device=device))[0]
    sums = torch.randn(4, 384, 256, device=device)

    def play(one: Engine) -> tuple[Tensor, ...]:
        total = sums.clone()
        one.wgrad(dy_turned, a_turned, groups, total)
        return one.product(a, Quantized(w.values[0], w.scales[0], w.tile)), one.product(a, w, groups), total

    try:
        for kind, ours, truth in zip(KINDS, play(engine), play(Emulate()), strict=True):
            off = float((ours.float() - truth.float()).norm() / truth.float().norm())
            if not off < 0.01:  # a NaN is not
                return f"its {kind} are {off:.1%} off"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def milliseconds(engines: Mapping[str, Engine], device: torch.device) -> Times:
    """Of a dense and a grouped product and a weight gradient: 2048 rows to each of 4 experts, 4096 x 4096."""
    from dryvine.trainer.fp8.kernels.every import quantize_blocks, quantize_both

    experts, rows, size = 4, 2048, 4096
    groups = ExpertGroups((rows,) * experts, device)
    x = torch.randn(experts * rows, size, device=device, dtype=torch.bfloat16)
    w = quantize_blocks(torch.randn(experts, size, size, device=device))[0]
    a, turned = quantize_both(x, groups)
    one = Quantized(w.values[0], w.scales[0], w.tile)
    total = torch.zeros(experts, size, size, device=device)
    runs: tuple[Callable[[Engine], object], ...] = (
        lambda engine: engine.product(a, one),
        lambda engine: engine.product(a, w, groups),
        lambda engine: engine.wgrad(turned, turned, groups, total),
    )
    return {
        kind: {name: _time(run, engine) for name, engine in engines.items()}
        for kind, run in zip(KINDS, runs, strict=True)
    }


def _time(run: Callable[[Engine], object], engine: Engine, times: int = 5) -> float:
    run(engine)  # compiles
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        run(engine)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / times
