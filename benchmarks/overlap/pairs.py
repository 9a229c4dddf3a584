"""How much of the all-to-all stays exposed: pairs and whole steps, with overlap off and on, beside the bound.

Phases of comm, streams, order tables, executor and the messages between stages are the real ones; only how long compute
and the link take is set (see overlap_toys.py). The bound of a pair is its compute alone or its communication alone,
whichever is longer, or the longest chain of an op that must run in order. On a GPU compute alone and communication
alone are measured in the same run, because GEMMs and copies do not take exactly the time that was asked of them.

    python -m benchmarks.overlap.pairs                   # CPU, about three minutes
    python -m benchmarks.overlap.pairs --device cuda     # one GPU, pairs alone
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track as progress
from rich.table import Table

from benchmarks.support.overlap_toys import Device, Nothing, Sleeper, Times, toy_flight, toy_stage
from dryvine.comm import local
from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.wire import P2PWire
from dryvine.parallel import overlap as weave
from dryvine.parallel.executor import Batch, EdgeWire, Executor
from dryvine.parallel.flow_control import rank_program
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.table import build
from dryvine.parallel.streams import make_streams

RATIOS = (4.0, 3.0, 2.0, 1.5, 1.2, 1.0, 0.75, 0.5)  # compute to communication, over an F&B pair
KINDS = ("FB", "FF", "BB", "FW", "IW")
LAYERS = 4
REPEATS = 5
RANKS = 4
PAIR_TITLE = "an F&B pair of four layers, compute to communication 1.5 to 1 (amber F, green I, blue W)"

# Per layer, in phases of equal length and in messages: what an op computes and sends.
COMPUTE = {"F": 2, "B": 4, "I": 2, "W": 2}
MESSAGES = {"F": 2, "B": 2, "I": 2, "W": 0}
CHAIN = {"F": 2, "B": 2, "I": 2, "W": 0}  # phases that must follow each other: no order can be shorter
STEPS = (
    ("one_f_one_b", "off"),
    ("one_f_one_b", "on"),
    ("zb1p", "on"),
    ("dualpipev", "on"),
    ("dualpipe", "off"),
    ("dualpipe", "on"),
)


def times_at(ratio: float, phase: float) -> Times:
    """An F&B pair of a layer computes 6 phases and sends 4 messages."""
    return Times(phase, 6 * phase / 4 / ratio)


def pair(kinds: str, times: Times, clockwork: Any, device: torch.device, overlap: bool) -> tuple[float, float]:
    """Seconds that a pair takes, and those in which compute stood still for the link."""
    stage, streams = toy_stage(0, LAYERS, times, clockwork), make_streams(device)()
    x = torch.zeros(1, device=device)
    tracks = [_track(kind, stage, x) for kind in kinds]
    _synchronise(device)
    start = time.perf_counter()
    weave.play(tracks, streams, weave.ORDERS[device.type] if overlap else None)
    _synchronise(device)
    return streams.end() - start, streams.exposed()


def _track(kind: str, stage: Any, x: torch.Tensor) -> weave.Track:
    flight = toy_flight(stage)
    if kind == "F":
        return weave.forward(stage, flight, (x,))
    if kind == "W":
        flight.wgrads.extend(phase.closures() for phase in reversed(stage.phases) if phase.stream == "compute")
        return weave.weights(flight)
    return weave.backward(stage, flight, (x,), split=kind == "I")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def pairs(device: torch.device, phase: float) -> list[dict[str, Any]]:
    clockwork = Device() if device.type == "cuda" else Sleeper()
    rows = []
    for kinds in KINDS:
        for ratio in RATIOS if kinds == "FB" else (2.0, 1.2, 1.0):
            times = times_at(ratio, phase)
            compute, comm = alone(kinds, times, clockwork, device)
            one, message = (t / sum(n[k] for k in kinds) for t, n in ((compute, COMPUTE), (comm, MESSAGES)))
            chains = [CHAIN[kind] * one + MESSAGES[kind] * message for kind in kinds]
            runs = [[pair(kinds, times, clockwork, device, o) for _ in range(REPEATS)] for o in (False, True)]
            (off, _), (on, stood) = (sorted(run)[REPEATS // 2] for run in runs)
            rows.append({"pair": kinds, "ratio": ratio, "off": off, "on": on, "bound": max(compute, comm, *chains)}
                        | {"exposed": stood / comm, "compute": compute, "comm": comm})  # fmt: skip
    return rows


def alone(kinds: str, times: Times, clockwork: Any, device: torch.device) -> tuple[float, float]:
    """Seconds of a pair's compute with messages that take no time, and of its messages without compute. On a CPU they
    are what was asked for: a sleep is as long as it says."""
    if device.type == "cpu":
        compute, messages = (sum(table[kind] for kind in kinds) for table in (COMPUTE, MESSAGES))
        return LAYERS * times.phase * compute, LAYERS * times.message * messages
    parts = Times(times.phase, 0.0), Times(0.0, times.message)
    runs = [sorted(pair(kinds, part, clockwork, device, False)[0] for _ in range(REPEATS)) for part in parts]
    return runs[0][REPEATS // 2], runs[1][REPEATS // 2]


def host(device: torch.device, layers: int = 200) -> float:
    """Host seconds per step of an F&B pair whose phases and messages take no time: what stage, overlap and streams
    cost. The best of a few, since it is the code that is asked about and not who else uses the machine."""
    stage = toy_stage(0, layers, Times(0.0, 0.0), Nothing())
    x, took = torch.zeros(1, device=device), []
    for _ in range(REPEATS):
        streams = make_streams(device)()
        start = time.perf_counter()
        tracks = [_track(kind, stage, x) for kind in "FB"]
        weave.play(tracks, streams, weave.ORDERS[device.type])
        took.append(time.perf_counter() - start)
        _synchronise(device)
    return min(took) / sum(len(unit) for track in tracks for unit in track.units)


def step(rank: int, name: str, overlap: str, microbatches: int, layers: int, times: Times) -> tuple[float, float]:
    """Seconds of one step of a whole schedule on this rank, and those in which it stood still for the link."""
    schedule = build(name, RANKS, microbatches)
    mesh = make_mesh(Layout(pp=RANKS, routes=len(schedule.routes)), torch.device("cpu"), timedelta(seconds=100))
    link, deep = Sleeper(), layers // schedule.stages  # one link a rank
    stages = {s: toy_stage(s, deep, times, link, schedule.stages) for s in schedule.stages_of(rank)}
    order = weave.ORDERS["cpu"] if overlap == "on" else None
    state = (torch.empty(1, device="meta"),)
    wire = EdgeWire(P2PWire(mesh), lambda edge: state)
    executor = Executor(rank_program(lower(schedule), rank), stages, wire, make_streams(mesh.device), order)
    took = []
    for _ in range(3):
        torch.distributed.barrier()
        start = time.perf_counter()
        played = executor.run(Batch([torch.zeros(1)] * microbatches, 1.0))
        took.append((time.perf_counter() - start, played.exposed))
    return sorted(took)[1]


def steps(ratio: float, microbatches: int, layers: int, phase: float) -> list[dict[str, Any]]:
    """Whole steps of every schedule; `exposed` is the mean share of a rank's communication that it stood still for."""
    times = times_at(ratio, phase)
    sent = layers / RANKS * microbatches * 4 * times.message
    rows = []
    for name, overlap in progress(STEPS, "whole steps"):
        ranks = local.run(step, RANKS, name, overlap, microbatches, layers, times, deadline=300)
        exposed = sum(stood for _, stood in ranks) / RANKS / sent
        rows.append({"schedule": name, "overlap": overlap, "M": microbatches, "ratio": ratio}
                    | {"seconds": max(took for took, _ in ranks), "exposed": exposed})  # fmt: skip
    return rows


def draw_pair(path: Path, phase: float) -> None:
    """The streams of one woven F&B pair, as they ran."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sleeper = Sleeper()
    pair("FB", times_at(1.5, phase), sleeper, torch.device("cpu"), overlap=True)
    zero = min(span.start for span in sleeper.spans)
    figure, axes = pyplot.subplots(figsize=(13, 2.4), layout="constrained")
    colours = {"F": "#f5b642", "B": "#3f8f5f", "I": "#3f8f5f", "W": "#7aa6d8"}
    for span in sleeper.spans:
        row = 1 if span.stream == "compute" else 0
        box = [(1e3 * (span.start - zero), 1e3 * (span.end - span.start))]
        axes.broken_barh(box, (row - 0.4, 0.8), color=colours[span.name[-2]], ec="white", lw=0.6)
        if span.end - span.start > 0.7 * phase:
            middle = 5e2 * (span.start + span.end - 2 * zero)
            axes.text(middle, row, span.name.replace("(", "\n("), ha="center", va="center", fontsize=5.5)
    axes.set(yticks=(0, 1), yticklabels=("all-to-all", "compute"), xlabel="ms", title=PAIR_TITLE)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=130)


def show(console: Console, pair_rows: list[dict[str, Any]], step_rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"pairs of {LAYERS} layers, ms")
    for column in ("pair", "compute : comm", "off", "on", "bound", "on / bound", "comm exposed"):
        table.add_column(column, justify="right")
    for r in pair_rows:
        ms = [f"{1e3 * r[key]:.1f}" for key in ("off", "on", "bound")]
        ratio = f"{r['compute'] / r['comm']:.2f}" if r["comm"] else "-"
        table.add_row(r["pair"], ratio, *ms, f"{r['on'] / r['bound']:.3f}", f"{r['exposed']:.1%}")
    console.print(table)
    if step_rows:
        base = step_rows[0]["seconds"]
        table = Table(title=f"whole steps, {RANKS} ranks")
        for column in ("schedule", "overlap", "M", "compute : comm", "seconds", "against 1F1B off", "comm exposed"):
            table.add_column(column, justify="right")
        for r in step_rows:
            row = (r["schedule"], r["overlap"], str(r["M"]), f"{r['ratio']:.1f}", f"{r['seconds']:.3f}")
            table.add_row(*row, f"{base / r['seconds']:.2f}x", f"{r['exposed']:.1%}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--phase-ms", type=float, default=10.0)
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--picture", type=Path, help="draw one woven pair there (CPU)")
    given = parser.parse_args()
    device, phase = torch.device(given.device), given.phase_ms / 1e3
    console = Console()
    console.print(f"{_machine(device)}; load average {os.getloadavg()[0]:.1f}; phases of {given.phase_ms} ms")
    took = host(device)
    console.print(f"host time {1e6 * took:.0f} microseconds a phase")
    pair_rows = pairs(device, phase)
    step_rows = steps(2.0, 16, 8, phase / 2) if device.type == "cpu" else []
    show(console, pair_rows, step_rows)
    if given.picture:
        draw_pair(given.picture, phase)
    if given.json:
        given.json.write_text(json.dumps({"host": took, "pairs": pair_rows, "steps": step_rows}, indent=1))


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    main()
