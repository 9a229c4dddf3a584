"""What is to be checked and measured on two GPUs of one host.

    python -m benchmarks.two_gpus --part checks|times|faults [--out FOLDER] [--deadline SECONDS]

`checks`: every layout of two ranks trains like one GPU in FP32, and twice to the same bits in its own dtypes (`dryvine
verify`), and 50 steps of `dryvine train` in three layouts have the losses of one GPU; side by side. `times`: whole
steps by one GPU and by the pipelines at M = 4, 8 and 32, against what the bubble allows, and the timeline of a DualPipe
step over its simulation; then two expert-parallel ranks with overlap off and on, at full speed and with the all-to-all
held to a few SMs, against compute alone and communication alone. `faults`: ranks lost and runs resumed (faults.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import faults
from benchmarks.one_gpu import Done, Job, play, table
from benchmarks.support.timed_steps import Memory, Timed, timed
from dryvine.comm.local import RankFailed
from dryvine.parallel.schedule.table import SCHEDULES
from dryvine.trainer import timeline
from dryvine.trainer.config import load
from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec

CLI = ("-c", "from dryvine.launch.cli import main; main()")
DEVIATING = r" in |rror|warning"  # a cell of verify's table that is out of bounds names its tensor
AT_ONCE = 5  # checks: 7 take turns on two GPUs for twice as long each, and 22 have no room in 80 GB
WIDE = (  # FP8 on a GPU needs sizes that are multiples of 128
    "model.hidden=128", "model.ffn=256", "model.expert_ffn=128", "model.q_lora=64", "model.kv_lora=64",
    "model.nope_dim=64", "model.rope_dim=16", "model.v_dim=64",
)  # fmt: skip
PIPELINES = ("one_f_one_b", "zb1p", "dualpipev", "dualpipe")
MICROBATCHES = (4, 8, 32)
BEFORE = 40.0  # seconds for a setting to end: none is begun later
STEPS = 50  # of the loss curves
DEADLINE = 12.0  # faults: seconds until a lost rank is named
CURVE = 0.02  # the largest difference of two runs' losses in BF16, nats


def corpus(out: Path, vocab: int) -> Path:
    """A dataset of standard library files."""
    folder = out / f"corpus-{vocab}"
    files = match_files([str(Path(sysconfig.get_path("stdlib")) / "[a-d]*.py")])
    build(files, BuildSpec(vocab_size=vocab, validation_fraction=0.3), folder)
    return folder


def checks(out: Path) -> list[Job]:
    layouts = {f"{name} {overlap}": _pipeline(name, overlap) for name in SCHEDULES for overlap in ("on", "off")}
    layouts |= {f"ep 2 {way}": _experts(way) for way in ("flat", "hierarchical", "nvlink", "auto")}
    layouts["dp 2"] = ("parallel.dp=2", "parallel.schedule=one_f_one_b")
    for dtype, words in {"bf16": ("run.dtype=bf16",), "fp8": ("run.dtype=bf16", "fp8.preset=deepseek_v3")}.items():
        layouts[f"dualpipe {dtype}"] = (*_pipeline("dualpipe", "on"), *words, *WIDE)
        for way in ("flat", "nvlink"):
            layouts[f"ep 2 {way} {dtype}"] = (*_experts(way), *words, *WIDE)
    verify = (*CLI, "verify", "tests/tiny.toml", "--device", "cuda", f"data.source={corpus(out, 320)}")
    return [Job(name, (*verify, *words), 300, DEVIATING) for name, words in layouts.items()]


def _pipeline(schedule: str, overlap: str) -> tuple[str, ...]:
    chunks = 2 if schedule == "interleaved" else 1
    return "parallel.pp=2", f"parallel.schedule={schedule}", f"parallel.chunks={chunks}", f"parallel.overlap={overlap}"


def _experts(dispatcher: str) -> tuple[str, ...]:
    return "parallel.ep=2", "parallel.schedule=dualpipev", f"comm.dispatcher={dispatcher}"


def curves(out: Path) -> list[Job]:
    """`dryvine train` in BF16 by one GPU and in three layouts of two."""
    data = corpus(out, 320)
    layouts = {"one": (), "pp": _pipeline("dualpipe", "on"), "ep": _experts("auto"), "dp": ("parallel.dp=2",)}
    return [
        Job(f"curve {name}", _train(out, f"curve_{name}", data, *words), 200, r"rror|warning|tokens/s")
        for name, words in layouts.items()
    ]


def _train(out: Path, name: str, data: Path, *words: str) -> tuple[str, ...]:
    run = (f"run.out={out}", f"run.name={name}", f"data.source={data}", f"run.steps={STEPS}", "run.device=cuda")
    return (*CLI, "train", "tests/tiny.toml", *run, "run.dtype=bf16", "run.eval_every=1000", *WIDE, *words)


def compare_curves(out: Path) -> list[Done]:
    """A row a layout: the largest difference of its losses to one GPU's."""
    losses = {
        path.parent.name: [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for path in out.glob("curve_*/metrics.jsonl")
    }
    alone = losses.pop("curve_one", [])
    found = []
    for name, curve in losses.items():
        largest = max((abs(a - b) for a, b in zip(alone, curve, strict=False)), default=float("inf"))
        fine = largest <= CURVE and len(curve) == len(alone) == STEPS
        note = f"{len(curve)} steps, loss {curve[0]:.3f} to {curve[-1]:.3f}, at most {largest:.4f} from one GPU's"
        found.append(Done(Job(name, (), 0, ""), "right" if fine else "WRONG", 0, [note]))
    return found


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


def part_checks(out: Path, at: float, console: Console) -> bool:
    results = play([*checks(out), *curves(out)], AT_ONCE, at, out, console) + compare_curves(out)
    console.print(table(results))
    return all(done.outcome == "right" for done in results)


def part_times(out: Path, at: float, console: Console) -> bool:
    complete = True
    for settings, tabulate in ((pipelines(), pipelines_table), (experts(), experts_table)):
        found = measure(settings, out, at, console)
        console.print(tabulate(found))
        draw(found, out)
        complete &= found.keys() == settings.keys()
    return complete


def part_faults(out: Path, at: float, console: Console) -> bool:
    """Its jobs have deadlines of their own."""
    run = faults.Run("cuda", DEADLINE, out)
    found = faults.findings(run, ("ops", "resume"), together=3)
    console.print(faults.table(found, run))
    return all(finding.fine for finding in found)


PARTS = {"checks": part_checks, "times": part_times, "faults": part_faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/two_gpus"), help="a folder for every job's whole output")
    parser.add_argument("--deadline", type=float, default=530, help="seconds for everything")
    options = parser.parse_args()
    if torch.cuda.device_count() < 2:
        sys.exit(f"two_gpus.py: needs two CUDA devices, torch sees {torch.cuda.device_count()}")
    out, at = options.out.resolve(), time.monotonic() + options.deadline
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    console = Console(width=160)
    console.print(f"2 x {torch.cuda.get_device_name()}, torch {torch.__version__}; whole output in {out}")
    return 0 if PARTS[options.part](out, at, console) else 1


if __name__ == "__main__":
    sys.exit(main())
