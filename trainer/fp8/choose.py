"""Which engine multiplies: the one the recipe names, or the fastest on this device, measured once.

Measured by kind of product, since no engine wins all: cuBLAS has the better dense kernels, the own ones know experts
and add weight gradients in place. A table of winners by GPU would be what this is instead of, and would be wrong by the
next driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dryvine.trainer.fp8.gemm import ENGINES, Emulate, Engine
from dryvine.trainer.fp8.tensors import Groups, Quantized

if TYPE_CHECKING:
    from dryvine.trainer.fp8.recipe import Recipe

ABSENT = {
    "deep_gemm": "has no adapter yet; fp8.gemm = 'triton' multiplies dense and grouped in the same recipe",
    "transformer_engine": "has no adapter yet; fp8.gemm = 'torch' calls the same cuBLAS kernels",
}


class CannotRun(ValueError):
    """The recipe's engine cannot work here; says why, and what would."""


@dataclass(frozen=True)
class Mixed:
    """An engine for each kind of product."""

    dense: Engine
    grouped: Engine
    sums: Engine

    @staticmethod
    def missing(device: torch.device) -> str | None:
        return None

    def product(
        self, a: Quantized, b: Quantized, groups: Groups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        return (self.dense if groups is None else self.grouped).product(a, b, groups, dtype)

    def wgrad(self, a: Quantized, b: Quantized, groups: Groups, total: Tensor) -> None:
        self.sums.wgrad(a, b, groups, total)


def check(recipe: Recipe, device: torch.device, widths: Sequence[int] = ()) -> None:
    """Raise CannotRun if the engine that the recipe names, or FFNs of these `widths`, cannot work on `device`."""
    name = recipe.gemm
    reason = ABSENT.get(name) or (ENGINES[name]().missing(device) if name in ENGINES else None)
    if recipe.fp8 and reason:
        raise CannotRun(f"fp8.gemm = '{name}' {reason}")
    odd = [width for width in widths if width % 128]
    if recipe.fp8 and odd and device.type == "cuda":
        raise CannotRun(f"[fp8] on a GPU: FFN width {odd[0]} is not a multiple of 128; change model.ffn or expert_ffn")


def choose(recipe: Recipe, device: torch.device) -> tuple[Engine, str]:
    """The engine, and a line for the log. Raises CannotRun."""
    check(recipe, device)
    name = recipe.gemm
    if name == "auto":
        able = {n: make() for n, make in ENGINES.items() if n != "emulate" and not make().missing(device)}
        return fastest(able, device) if able else (_emulate(recipe), f"fp8.gemm: emulate, the one there is on {device}")
    if name == "emulate":
        return _emulate(recipe), "fp8.gemm: emulate, as asked"
    return ENGINES[name](), f"fp8.gemm: {name}, as asked"


def _emulate(recipe: Recipe) -> Emulate:
    return Emulate(recipe.accumulator, recipe.promotion)


def fastest(engines: dict[str, Engine], device: torch.device) -> tuple[Engine, str]:
    """Times a dense and a grouped product and a weight gradient, 2048 rows to each of 4 experts, 4096 x 4096."""
    from dryvine.trainer.fp8.kernels import cast

    experts, rows, size = 4, 2048, 4096
    groups = Groups((rows,) * experts, device)
    x = torch.randn(experts * rows, size, device=device, dtype=torch.bfloat16)
    w = cast.quantize_blocks(torch.randn(experts, size, size, device=device))[0]
    a, turned = cast.quantize_both(x, groups)
    one = Quantized(w.values[0], w.scales[0], w.tile)
    total = torch.zeros(experts, size, size, device=device)
    kinds: dict[str, Callable[[Engine], object]] = {
        "dense": lambda engine: engine.product(a, one),
        "grouped": lambda engine: engine.product(a, w, groups),
        "weight gradients": lambda engine: engine.wgrad(turned, turned, groups, total),
    }
    taken, said = [], []
    for kind, run in kinds.items():
        times = {name: _milliseconds(run, engine) for name, engine in engines.items()}
        best = min(times, key=lambda name: times[name])
        taken.append(engines[best])
        said.append(f"{kind} {best} (" + ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()) + ")")
    return Mixed(*taken), "fp8.gemm: " + "; ".join(said)


def _milliseconds(run: Callable[[Engine], object], engine: Engine, times: int = 5) -> float:
    run(engine)  # compiles
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        run(engine)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / times
