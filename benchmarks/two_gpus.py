"""Whole steps on two GPUs of one host, by one setting after the other.

    python -m benchmarks.two_gpus pipelines|experts [--out FOLDER] [--deadline SECONDS]

`pipelines`: one GPU and the pipelines at M = 4, 8 and 32, against what the bubble allows, and the timeline of a
DualPipe step over its simulation. `experts`: two expert-parallel ranks with overlap off and on, at full speed and with
the all-to-all held to a few SMs, against compute alone and communication alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.support.corpus import corpus
from benchmarks.support.timed_steps import Memory, Timed, timed
from dryvine.comm.local import RankFailed
from dryvine.trainer import timeline
from dryvine.trainer.config import load

PIPELINES = ("one_f_one_b", "zb1p", "dualpipev", "dualpipe")
MICROBATCHES = (4, 8, 32)
BEFORE = 40.0  # seconds for a setting to end: none is begun later

Settings = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]  # name -> words, sequences in a step


def pipelines() -> Settings:
    one = ("parallel.pp=1", "parallel.schedule=one_f_one_b")
    return {"one GPU": (one, MICROBATCHES)} | {
        name: ((f"parallel.schedule={name}",), MICROBATCHES) for name in PIPELINES
    }


def experts() -> Settings:
    """`fake` sends nothing: compute alone."""
    layout = ("parallel.pp=1", "parallel.ep=2", "parallel.schedule=dualpipev")
    fp8 = ("fp8.preset=deepseek_v3",)
    settings: dict[str, tuple[str, ...]] = {}
    for dtype, words in (("BF16", ()), ("FP8", fp8)):
        settings[f"{dtype}, compute alone"] = ("comm.dispatcher=fake", *words)
        for overlap in ("off", "on"):
            settings[f"{dtype}, {overlap}"] = (f"parallel.overlap={overlap}", *words)
            settings[f"{dtype}, nvlink, {overlap}"] = (f"parallel.overlap={overlap}", "comm.dispatcher=nvlink", *words)
    for sms in (2, 8):
        for overlap in ("off", "on"):
            settings[f"BF16, {sms} SMs, {overlap}"] = (f"parallel.overlap={overlap}", f"comm.sms={sms}")
    return {name: ((*layout, *words), (16,)) for name, words in settings.items()}


Found = dict[str, tuple[dict[int, Timed], Memory]]


def measure(settings: Settings, out: Path, at: float, console: Console) -> Found:
    """One setting after the other until `at`; one that fails is reported and left out."""
    data, found = corpus(out, 4096), Found()
    for name, (words, sizes) in settings.items():
        left, began = at - time.monotonic(), time.monotonic()
        if left < BEFORE:
            console.print(f"-- {name}: no time left")
            continue
        try:
            config = load("benchmarks/two_gpus.toml", (f"data.source={data}", f"run.out={out}", *words))
            found[name] = timed(config, sizes, min(left, 120.0))
        except (RankFailed, ValueError) as error:
            console.print(f"-- {name}: {str(error)[-1500:]}", markup=False)
            continue
        figures = {size: f"{t.tokens_per_second:,.0f} tokens/s" for size, t in found[name][0].items()}
        console.print(f"-- {name}: {figures}, {time.monotonic() - began:.0f} s")
    return found


STEP = ("tokens/s a GPU", "of one GPU", "over 1F1B", "(M+1)/M", "bubble", "over simulated", "exposed ms")
EXPERTS = ("step ms", "schedule ms", "exposed ms", "compute alone", "comm alone", "bound", "over bound")
MEMORY = ("peak GB", "over predicted")


def pipelines_table(found: Found) -> Table:
    """Goals: DualPipe at M = 32 at least 0.95 of one GPU's tokens/s a GPU; every schedule's time over its simulation
    within 5%; DualPipe over 1F1B at least 0.97 (M + P - 1) / M."""
    made = Table("schedule", "M", *STEP, *MEMORY)
    for name, (by_size, memory) in found.items():
        for size, t in by_size.items():
            rate = t.tokens_per_second / (1 if name == "one GPU" else 2)
            alone, plain = _rate(found, "one GPU", size), _rate(found, "one_f_one_b", size) / 2
            shares = [f"{x:.3f}" for x in (rate / alone, rate / plain, (size + 1) / size)]
            waits = f"{t.bubble:.1%}", f"{t.over_simulated:.3f}", f"{1e3 * t.exposed:.0f}"
            made.add_row(name, str(size), f"{rate:,.0f}", *shares, *waits, *_memory(memory))
    return made


def _rate(found: Found, name: str, size: int) -> float:
    return found[name][0][size].tokens_per_second if name in found else float("nan")


def _memory(memory: Memory) -> tuple[str, str]:
    return f"{memory.peak / 1e9:.1f}", f"{memory.over_predicted:.3f}"


def experts_table(found: Found) -> Table:
    """Communication alone is what is exposed with overlap off. Goal: on at most 1.05 of the longer of the two."""
    made = Table("setting", *EXPERTS, *MEMORY)
    for name, (by_size, memory) in found.items():
        t, parts = by_size[16], name.split(", ")
        alone, off = (found.get(n) for n in (f"{parts[0]}, compute alone", ", ".join([*parts[:-1], "off"])))
        compute = alone[0][16].played if alone else float("nan")
        comm = off[0][16].exposed if off else float("nan")
        bound = max(compute, comm)
        ms = [f"{1e3 * s:.0f}" for s in (t.seconds, t.played, t.exposed, compute, comm, bound)]
        made.add_row(name, *ms, f"{t.played / bound:.3f}", *_memory(memory))
    return made


def draw(found: Found, out: Path) -> None:
    """The last DualPipe step of 8 microbatches over its simulation."""
    if "dualpipe" in found and (step := found["dualpipe"][0][8].timeline):
        timeline.write(out / "dualpipe.html", step)


PARTS = {"pipelines": (pipelines, pipelines_table), "experts": (experts, experts_table)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("runs/two_gpus"), help="a folder for corpus and timeline")
    parser.add_argument("--deadline", type=float, default=530, help="seconds for everything")
    options = parser.parse_args()
    out, at = options.out.resolve(), time.monotonic() + options.deadline
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    console, (settings, tabulate) = Console(width=160), PARTS[options.part]
    console.print(f"2 x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    found = measure(settings(), out, at, console)
    console.print(tabulate(found))
    draw(found, out)
    return 0 if found.keys() == settings().keys() else 1


if __name__ == "__main__":
    sys.exit(main())
