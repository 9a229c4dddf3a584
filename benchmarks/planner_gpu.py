"""Plans beside steps on one or two GPUs: bytes of state and messages, the peak of live tensors, seconds of a step.

    python -m benchmarks.planner_gpu --gpus 1|2 [--deadline 400]

Seconds are planned from a profile of the model on one GPU alone. Routing is made even, as plans suppose it. Each layout
is trained twice: with `parallel.graphs` off, for memory and messages, since temporaries of CUDA graphs lie in their
pools and are no live tensors; and as `auto` has it, for seconds, if that records its ops (not those of `ep 2`, whose
dispatcher is flat). Live tensors are the allocator's `requested_bytes`: what tensors asked for, without the rounding of
blocks. State is compared before the first step, on every rank; what idle ranks hold beside it (cuBLAS's workspaces,
tokens) is a column of its own. Goals: state and messages equal, the peak within 5%, seconds within 10%.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.support.corpus import corpus
from dryvine.comm import local
from dryvine.comm.local import RankFailed
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.memory import RankMemory
from dryvine.launch.plan.plan import Plan, make
from dryvine.launch.plan.profiled import Profile
from dryvine.launch.profile import measure
from dryvine.trainer.config import Config, load
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.graph_memory import graphs_refusal
from dryvine.trainer.ramps import Point
from dryvine.trainer.rehearse import rehearse
from dryvine.trainer.rig import make_rig, mesh_of
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.step import train_step
from tests.support.live import evenly, state

ALONE = (
    "parallel.pp=1", "parallel.dp=1", "parallel.ep=1", "parallel.schedule=one_f_one_b", "run.device=cuda",
    "data.vocab_size=320",
)  # fmt: skip
# Narrow: 16,384 tokens a microbatch of narrow layers, whose kernels the host can hardly launch as fast as they run.
NARROW = ("configs/moe_1b.toml", "model.layers=6", "batch.sequences=64")
# Wide: 16,384 tokens of wider ones, which keep the device busy.
WIDE = (
    "benchmarks/two_gpus.toml", "model.layers=4", "batch.ramp_from=16", "batch.ramp_increment=16",
    "parallel.microbatch_sequences=4", "optim.moments=bf16",
)  # fmt: skip
FP8 = ("fp8.preset=deepseek_v3",)
Words = tuple[str, ...]
T = TypeVar("T")
# Layouts of each number of GPUs: the model, and what is changed of `ALONE`.
LAYOUTS: dict[int, dict[str, tuple[Words, Words]]] = {
    1: {
        "wide, BF16": (WIDE, ()),
        "narrow, BF16": (NARROW, ()),
        "wide, FP8": ((*WIDE, *FP8), ()),
        "wide, BF16, dualpipev": (WIDE, ("parallel.schedule=dualpipev",)),
    },
    2: {
        "wide, dualpipe": (WIDE, ("parallel.pp=2", "parallel.schedule=dualpipe")),
        "wide, dp 2": (WIDE, ("parallel.dp=2",)),
        "wide, 1F1B": (WIDE, ("parallel.pp=2",)),
        "wide, ep 2": (WIDE, ("parallel.ep=2", "comm.dispatcher=flat")),
        "wide, FP8, dualpipe": ((*WIDE, *FP8), ("parallel.pp=2", "parallel.schedule=dualpipe")),
    },
}
WARM, STEPS = 2, 5
BEFORE = 20.0  # seconds for a layout to end: none is begun later


class RankFound(NamedTuple):
    """Of one rank. Bytes by kind and link as in a plan; `idle` before the first step. `seconds` are a step's, and
    `schedule` what its schedule has of them; `graphs` is how many CUDA graphs it has."""

    state: dict[str, int]
    sent: dict[str, int]
    idle: int
    peak: int
    seconds: float
    schedule: float
    graphs: int


def profile(rank: int, config: Config) -> Profile:
    """For `local.run`."""
    return measure(config, torch.device("cuda", torch.cuda.current_device()), 3, lambda part: None)


def train(rank: int, config: Config) -> RankFound:
    """For `local.run`."""
    plan = make_plan(config)
    rig = make_rig(plan, mesh_of(plan, torch.device("cuda", torch.cuda.current_device())), open_data(config))
    for gate in rig.model.gates.values():
        gate.choose = evenly(gate)  # type: ignore[method-assign]
    rehearse(rig)
    held, idle = state(rig), _requested("current")
    torch.cuda.reset_peak_memory_stats()
    times, played, sent = [], [], dict[str, int]()
    for step in range(WARM + STEPS):
        size = config.batch.sequences
        rig.mesh.sum(torch.zeros(1, device=rig.mesh.device), "start of a step")
        torch.cuda.synchronize()
        rig.dispatcher.meter.take()
        began = time.perf_counter()
        outcome = train_step(rig, Point(step, step * size, size, config.data.seq_len))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        played.append(outcome.played.ended - began)
        sent = dict(rig.dispatcher.meter.take())
    rig.optimizer.zero.settle()
    graphs = rig.graphs.count if rig.graphs else 0
    return RankFound(held, sent, idle, _requested("peak"), median(times[WARM:]), median(played[WARM:]), graphs)


def _requested(which: str) -> int:
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])


class Row(NamedTuple):
    """A layout: what was planned for it without graphs, and what its ranks had, in their order: without graphs, and as
    `auto` has it."""

    plan: Plan
    ranks: list[RankFound]
    usual: list[RankFound]

    def of(self, rank: int) -> RankMemory:
        p = self.plan.config.parallel
        return self.plan.ranks[rank // (p.dp * p.ep)]

    def exact(self) -> bool:
        """Whether state and messages of every rank are as planned."""
        p = self.plan.config.parallel
        return all(
            found.state == {kind: self.of(rank).kinds[kind] for kind in found.state}
            and found.sent == {k: n for k, n in self.plan.dispatch_bytes_of(rank // (p.dp * p.ep)).items() if n}
            for rank, found in enumerate(self.ranks)
        )

    def peaks(self) -> list[float]:
        """Measured over planned, of every rank."""
        return [found.peak / self.of(rank).total for rank, found in enumerate(self.ranks)]


def slowest(ranks: list[RankFound]) -> float:
    """Seconds of a step."""
    return max(found.seconds for found in ranks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, choices=LAYOUTS, default=1)
    parser.add_argument("--deadline", type=float, default=400, help="seconds for everything")
    options = parser.parse_args()
    began = time.monotonic()
    ends, profiles, rows = began + options.deadline, dict[Words, Profile](), dict[str, Row]()
    local.preload(
        "dryvine.launch.plan.plan", "dryvine.launch.profile", "dryvine.trainer.rehearse", "benchmarks.support.corpus"
    )
    with tempfile.TemporaryDirectory() as folder:
        given = (f'data.source="{corpus(Path(folder), 320)}"', f'run.out="{folder}"')
        for name, (model, layout) in LAYOUTS[options.gpus].items():
            if ends - time.monotonic() < BEFORE:
                print(f"{name}: no time left", flush=True)
                continue
            try:
                rows[name] = compare(profiles, (*model, *ALONE, *given), layout, ends)
            except RankFailed as error:
                print(f"{name}: {str(error)[-1500:]}", flush=True)
                continue
            show_kinds(name, rows[name])
            print(f"{time.monotonic() - began:.0f} s so far", flush=True)
    Console(width=150).print(table(rows))
    return 0 if rows and all(row.exact() for row in rows.values()) else 1


def compare(profiles: dict[Words, Profile], model: Words, layout: Words, ends: float) -> Row:
    """Profile the model on one GPU if it has not been, and train it in this layout, until `ends` (`time.monotonic`)."""
    path, *words = model
    usual, without = (load(path, [*words, *layout, f"parallel.graphs={way}"]) for way in ("auto", "off"))

    def run(fn: Callable[[int, Config], T], config: Config) -> list[T]:
        return local.run(fn, config.parallel.world, config, deadline=ends - time.monotonic(), device="cuda")

    if model not in profiles:
        (profiles[model],) = run(profile, load(path, words))
    found = run(train, without)
    plan = make(make_plan(without), load_hardware("h100"), profiles[model])
    return Row(plan, found, found if graphs_refusal(usual, cuda=True) else run(train, usual))


def show_kinds(name: str, row: Row) -> None:
    """A line a rank: GB by kind as planned, and what was measured."""
    for rank, found in enumerate(row.ranks):
        kinds = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in row.of(rank).kinds.items() if size)
        print(f"{name}, rank {rank}: planned {kinds}; idle {found.idle / 1e9:.3f}, peak {found.peak / 1e9:.3f}")
    planned = row.plan.timeline.span, row.plan.step_seconds
    print(f"{name}: planned {_times(*planned)}", flush=True)
    for ranks in (row.ranks, row.usual):
        measured = max(found.schedule for found in ranks), slowest(ranks)
        print(f"{name}: measured with {ranks[0].graphs} graphs {_times(*measured)}", flush=True)


def _times(schedule: float, step: float) -> str:
    return f"{1e3 * schedule:.1f} ms to the end of the schedule, {1e3 * step:.1f} in all"


def table(rows: dict[str, Row]) -> Table:
    made = Table(
        "layout", "state, messages", "peak, GB", "planned", "measured / planned", "idle beside state, GB",
        "step, no graphs, ms", "graphs", "step, ms", "planned", "planned / measured",
        title=torch.cuda.get_device_name(),
    )  # fmt: skip
    for name, row in rows.items():
        ratios = row.peaks()
        worst = max(range(len(ratios)), key=lambda rank: abs(ratios[rank] - 1))
        found, seconds = row.ranks[worst], slowest(row.usual)
        made.add_row(
            name, "equal" if row.exact() else "DIFFERENT", f"{found.peak / 1e9:.2f}",
            f"{row.of(worst).total / 1e9:.2f}", f"{ratios[worst]:.3f}",
            f"{(found.idle - sum(found.state.values())) / 1e9:.2f}", f"{1e3 * slowest(row.ranks):.1f}",
            f"{row.usual[0].graphs}", f"{1e3 * seconds:.1f}", f"{1e3 * row.plan.step_seconds:.1f}",
            f"{row.plan.step_seconds / seconds:.3f}",
        )  # fmt: skip
    return made


if __name__ == "__main__":
    sys.exit(main())
