"""How long a save holds up the training: the stall of `Saver.begin` against the copy that it cannot do without, and
against a save that waits for the disk.

    python -m benchmarks.saves [--mib 512] [--rounds 5] [--out FOLDER] [--device cpu|cuda]

One process, so no rank waits for another; medians over rounds, all in one run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dryvine.comm.mesh import Layout, make_mesh
from dryvine.trainer.checkpoint.files import Place
from dryvine.trainer.checkpoint.save import Keep, Saver
from dryvine.trainer.checkpoint.state import RunState

TENSORS = 64


def state(mib: int, device: torch.device) -> RunState:
    """Masters and two moments of so many MiB together."""
    size = mib * 2**20 // 4 // 3 // TENSORS
    fields = ("master", "exp_avg", "exp_avg_sq")
    pieces = {(f"w{i}", 0): {field: torch.randn(size, device=device) for field in fields} for i in range(TENSORS)}
    return RunState(pieces, {}, {f"w{i}": (size,) for i in range(TENSORS)})


def timed(action: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    live = state(given.mib, device)
    host = {place: torch.empty(t.shape, pin_memory=device.type == "cuda") for place, t in live.tensors().items()}
    pageable = {place: torch.zeros(t.shape) for place, t in live.tensors().items()}
    with tempfile.TemporaryDirectory(dir=given.out) as folder:
        saver = Saver(Path(folder), Keep(1), make_mesh(Layout(1, 1, 1, 1), device, timedelta(seconds=60)))

        def copy(to: dict[Place, Tensor] = host) -> None:
            for place, tensor in live.tensors().items():
                to[place].copy_(tensor, non_blocking=True)

        saver.prepare(live)
        first = timed(lambda: saver.begin(1, live), device)
        saver.finish()
        copy()
        copy(pageable)
        rows: list[tuple[float, float, float, float]] = []
        for number in range(given.rounds):
            copied, plain = timed(copy, device), timed(lambda: copy(pageable), device)
            stalled = timed(lambda step=number + 2: saver.begin(step, live), device)  # type: ignore[misc]
            rows.append((copied, plain, stalled, stalled + timed(saver.finish, device)))
        saver.close()
    copied, plain, stalled, whole = (median(column) for column in zip(*rows, strict=True))
    table = Table("", "ms", "of the copy", title=f"{given.mib} MiB of state, {device}, {given.rounds} rounds")
    named = {"copy": copied, "copy to memory that is not pinned": plain, "stall": stalled, "stall of the first": first}
    for name, value in (named | {"until saved": whole}).items():
        table.add_row(name, f"{value:,.0f}", f"{value / copied:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
