"""Tests an engine on this GPU: whether its products are right, and how fast each kind is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dryvine.trainer.fp8.casts import quantize_blocks, quantize_both, quantize_columns
from dryvine.trainer.fp8.engines.emulate import Emulate
from dryvine.trainer.fp8.engines.mixed import KINDS
from dryvine.trainer.fp8.engines.protocol import Products
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized

Times = dict[str, dict[str, float]]  # kind -> engine -> milliseconds


def fault(engine: Products, device: torch.device) -> str | None:
    """Why an engine must not be used: it raises, or differs by over 1% from emulation on a small product of each kind.
    A changed package would otherwise show up only in the loss of a run."""
    # Ragged counts, with an expert that has no rows and one whose rows straddle two blocks.
    groups = ExpertGroups((100, 0, 28, 136), device)
    x, dy = (torch.randn(groups.rows, width, device=device) for width in (256, 384))
    (a, a_transposed), dy_transposed = quantize_both(x, groups), quantize_columns(dy, groups)
    w = quantize_blocks(torch.randn(4, 384, 256, device=device))[0]
    sums = torch.randn(4, 384, 256, device=device)

    def results(one: Products) -> tuple[Tensor, ...]:
        total = sums.clone()
        one.wgrad(dy_transposed, a_transposed, groups, total)
        return one.product(a, Quantized(w.values[0], w.scales[0], w.tile)), one.product(a, w, groups), total

    try:
        for kind, ours, truth in zip(KINDS, results(engine), results(Emulate()), strict=True):
            error = float((ours.float() - truth.float()).norm() / truth.float().norm())
            # Not `error >= 0.01`, which is false of a NaN.
            if not error < 0.01:
                return f"its {kind} are {error:.1%} off"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def milliseconds(engines: Mapping[str, Products], device: torch.device) -> Times:
    """The times of a dense product, a grouped one and a weight gradient: 2048 rows for each of 4 experts, 4096 x
    4096."""
    experts, rows, size = 4, 2048, 4096
    groups = ExpertGroups((rows,) * experts, device)
    x = torch.randn(experts * rows, size, device=device, dtype=torch.bfloat16)
    w = quantize_blocks(torch.randn(experts, size, size, device=device))[0]
    a, a_transposed = quantize_both(x, groups)
    one = Quantized(w.values[0], w.scales[0], w.tile)
    total = torch.zeros(experts, size, size, device=device)
    runs: tuple[Callable[[Products], object], ...] = (
        lambda engine: engine.product(a, one),
        lambda engine: engine.product(a, w, groups),
        lambda engine: engine.wgrad(a_transposed, a_transposed, groups, total),
    )
    return {
        kind: {name: _time(run, engine) for name, engine in engines.items()}
        for kind, run in zip(KINDS, runs, strict=True)
    }


def _time(run: Callable[[Products], object], engine: Products, times: int = 5) -> float:
    # The first run compiles.
    run(engine)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        run(engine)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / times
