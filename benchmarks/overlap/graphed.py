"""A step of expert-parallel ranks with CUDA graphs, beside its compute alone and its messages alone.

    python -m benchmarks.overlap.graphed [--set KEY=VALUE ...] [--numerics BF16 FP8] [--deadline SECONDS] [--json FILE]

The model of two_gpus.toml on two GPUs, joined by `nvlink`, under DualPipeV on one pipeline rank, whose ops come in
pairs. Three ways of one step, all with the same graphs: `whole`; `compute`, in which no message is sent or awaited, so
that experts have the rows of the message before; `messages`, in which no graph is replayed. The goal is whole over the
longer of the two of at most 1.03. Every expert gets as many rows as any other, since ranks that are loaded unevenly
wait for each other. Times are of the schedule, from one idle device to the next, the slowest rank's, medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.host import CONFIG, NUMERICS
from benchmarks.support.corpus import corpus
from dryvine.comm import local
from dryvine.comm.dispatch.windows import Windows
from dryvine.parallel.executor import Executor
from dryvine.trainer.config import load
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.ramps import Point
from dryvine.trainer.rehearse import rehearse
from dryvine.trainer.rig import make_rig, mesh_of
from dryvine.trainer.run_plan import RunPlan, make_plan
from dryvine.trainer.step import train_step
from tests.support.live import evenly

LAYOUT = ("parallel.pp=1", "parallel.ep=2", "parallel.schedule=dualpipev", "comm.dispatcher=nvlink")
WAYS = ("whole", "compute", "messages")
WARM, STEPS, SEQUENCES = 3, 6, 8  # sequences of a rank
LEFT_OUT: dict[str, tuple[tuple[type, str], ...]] = {
    "whole": (),
    "compute": ((Windows, "_post"), (Windows, "_wait"), (Windows, "_release")),
    "messages": ((torch.cuda.CUDAGraph, "replay"),),
}


class Ways:
    """Which way is played; made before anything is recorded, since graphs keep what is to be called."""

    def __init__(self) -> None:
        self.way, self.seconds = "whole", list[float]()
        for cls, name in (each for some in LEFT_OUT.values() for each in some):
            setattr(cls, name, self._unless_left_out(cls, name))
        run = Executor.run

        def timed(executor: Executor, batch: Any) -> Any:
            torch.cuda.synchronize()
            began = time.perf_counter()
            played = run(executor, batch)
            torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - began)
            return played

        Executor.run = timed  # type: ignore[method-assign]

    def _unless_left_out(self, cls: type, name: str) -> Callable[..., Any]:
        plain = getattr(cls, name)

        def call(*given: Any) -> Any:
            return None if (cls, name) in LEFT_OUT[self.way] else plain(*given)

        return call


def measure(rank: int, plan: RunPlan) -> dict[str, list[float]]:
    """Seconds of each step by way, on this process's GPU."""
    ways, device = Ways(), torch.device("cuda", torch.cuda.current_device())
    rig = make_rig(plan, mesh_of(plan, device), open_data(plan.config))
    for gate in rig.model.gates.values():
        gate.choose = evenly(gate)  # type: ignore[method-assign]
    rehearse(rig)
    assert rig.graphs is not None, rig.replays
    found, sequences = dict[str, list[float]](), SEQUENCES * plan.config.parallel.ep
    for number, way in enumerate(WAYS):
        for step in range(number * (WARM + STEPS), (number + 1) * (WARM + STEPS)):
            rig.mesh.barrier("start of a step")
            ways.way = way
            train_step(rig, Point(step, step * sequences, sequences, plan.config.data.seq_len))
            ways.way = "whole"
        found[way] = ways.seconds[-STEPS:]
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--set", nargs="*", default=[], help="more of the config, as table.key=value")
    options.add_argument("--numerics", nargs="*", default=list(NUMERICS), choices=list(NUMERICS))
    options.add_argument("--deadline", type=float, default=120.0, help="seconds for each of them")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    table, made = Table("", *(f"{way} ms" for way in WAYS), "whole over the longer"), dict[str, dict[str, float]]()
    local.preload(__name__)
    with tempfile.TemporaryDirectory() as folder:
        source = f'data.source="{corpus(Path(folder), 320)}"'
        for numerics in given.numerics:
            plan = make_plan(load(CONFIG, (*LAYOUT, source, *NUMERICS[numerics], *given.set)))
            world = plan.config.parallel.world
            ranks = local.run(measure, world, plan, deadline=given.deadline, device="cuda")
            ms = {way: 1e3 * median(map(max, zip(*(rank[way] for rank in ranks), strict=True))) for way in WAYS}
            made[numerics] = ms
            ratio = ms["whole"] / max(ms["compute"], ms["messages"])
            table.add_row(numerics, *(f"{ms[way]:.1f}" for way in WAYS), f"{ratio:.3f}")
            print(f"{numerics}: {ms}, {ratio:.3f}", flush=True)
    Console(width=100).print(table)
    if given.json:
        given.json.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
