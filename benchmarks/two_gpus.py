"""What is to be checked and measured on two GPUs of one host.

    python -m benchmarks.two_gpus --part checks|times [--out FOLDER] [--deadline SECONDS]

`checks`: every layout of two ranks trains like one GPU in FP32, and twice to the same bits in its own dtypes (`dryvine
verify`), side by side. `times`: whole steps of one model by one GPU, by the pipelines and by two expert-parallel ranks,
one after the other; the last table's tokens/s are of both GPUs together. Jobs, deadlines and the table are those of
benchmarks/one_gpu.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.one_gpu import Job, play, table
from dryvine.parallel.schedule.table import SCHEDULES
from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec

CLI = ("-c", "from dryvine.launch.cli import main; main()")
DEVIATING = r" in |rror"  # a cell of verify's table that is out of bounds names its tensor
AT_ONCE = 7  # checks: 22 were more than two GPUs of 80 GB have memory for
STEPS = r"tokens/s|bubble|exposed|pipeline messages|rror"


def corpus(out: Path, vocab: int) -> Path:
    """A dataset of standard library files."""
    folder = out / f"corpus-{vocab}"
    files = match_files([str(Path(sysconfig.get_path("stdlib")) / "[a-d]*.py")])
    build(files, BuildSpec(vocab_size=vocab, validation_fraction=0.3), folder)
    return folder


def checks(out: Path) -> list[Job]:
    layouts = {f"{name} {overlap}": _pipeline(name, overlap) for name in SCHEDULES for overlap in ("on", "off")}
    layouts |= {f"ep 2 {way}": _experts(way) for way in ("flat", "hierarchical", "auto")}
    layouts["dp 2"] = ("parallel.dp=2", "parallel.schedule=one_f_one_b")
    for dtype, words in {"bf16": ("run.dtype=bf16",), "fp8": ("run.dtype=bf16", "fp8.preset=deepseek_v3")}.items():
        layouts[f"dualpipe {dtype}"] = (*_pipeline("dualpipe", "on"), *words)
        layouts[f"ep 2 {dtype}"] = (*_experts("flat"), *words)
    verify = (*CLI, "verify", "tests/tiny.toml", "--device", "cuda", f"data.source={corpus(out, 320)}")
    return [Job(name, (*verify, *words), 300, DEVIATING) for name, words in layouts.items()]


def _pipeline(schedule: str, overlap: str) -> tuple[str, ...]:
    chunks = 2 if schedule == "interleaved" else 1
    return "parallel.pp=2", f"parallel.schedule={schedule}", f"parallel.chunks={chunks}", f"parallel.overlap={overlap}"


def _experts(dispatcher: str) -> tuple[str, ...]:
    return "parallel.ep=2", "parallel.schedule=dualpipev", f"comm.dispatcher={dispatcher}"


def times(out: Path) -> list[Job]:
    one = ("parallel.pp=1", "parallel.schedule=one_f_one_b")
    runs = {"one GPU": one, "one GPU, M 32": (*one, "batch.sequences=32")}
    for sequences in (8, 32):
        for name in ("one_f_one_b", "zb1p", "dualpipev", "dualpipe"):
            runs[f"{name}, M {sequences}"] = (f"parallel.schedule={name}", f"batch.sequences={sequences}")
    for overlap in ("off", "on"):
        layout = ("parallel.pp=1", "parallel.ep=2", "parallel.schedule=dualpipev", "batch.sequences=16")
        runs[f"ep 2, overlap {overlap}"] = (*layout, f"parallel.overlap={overlap}")
    data = corpus(out, 4096)
    return [Job(name, _train(out, name, data, *words), 100, STEPS) for name, words in runs.items()]


def _train(out: Path, name: str, data: Path, *words: str) -> tuple[str, ...]:
    """The command of a run. Its checkpoint, tens of gigabytes, goes when it has ended."""
    folder = out / name.replace(" ", "_").replace(",", "")
    code = f"import shutil\nfrom dryvine.launch.cli import main\ntry: main()\nfinally: shutil.rmtree({str(folder)!r})"
    run = (f"run.out={folder.parent}", f"run.name={folder.name}", f"data.source={data}")
    return ("-c", code, "train", "benchmarks/two_gpus.toml", *run, *words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["checks", "times"], required=True)
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
    results = play(checks(out), AT_ONCE, at, out, console) if options.part == "checks" else []
    results += play(times(out), 1, at, out, console) if options.part == "times" else []
    console.print(table(results))
    return 0 if all(done.outcome == "right" for done in results) else 1


if __name__ == "__main__":
    sys.exit(main())
