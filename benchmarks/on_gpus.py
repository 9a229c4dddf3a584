"""What is checked and measured on the GPUs of one host, side by side: checks first, then times.

    python -m benchmarks.on_gpus [--part checks|times|lost|slow ...] [--gpus N] [--only NAME ...] [--list]
                                 [--out FOLDER] [--archive FILE.zip] [--deadline SECONDS]

For one, two, four or more Hopper GPUs, of which each job takes one, two or four. Each job is a process with a limit of
its own; the lines that matter are printed as it ends, its whole output is FOLDER/<job>.txt and in the archive, and a
table of all jobs comes last. A job that fails or is late does not stop the others. `--list` tells the jobs, and how
long they take together. Exits with 1 unless there were jobs and all were right. Needs the project's packages and
pytest; without `compute-sanitizer` or transformers, their jobs report that.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.support import gpu_jobs, jobs
from benchmarks.support.corpus import corpus
from benchmarks.support.jobs import TOO_LATE, Job, Session, forecast


def chosen(parts: Sequence[str], gpus: int, only: Sequence[str], out: Path) -> tuple[list[Job], list[Job]]:
    """Jobs in the order in which they start, and those that need more GPUs than there are."""
    found = [job for part in parts for job in sorted(gpu_jobs.PARTS[part](out), key=_first)]
    found = [job for job in found if not only or any(fnmatch(job.name, pattern) for pattern in only)]
    return [job for job in found if job.gpus <= gpus], [job for job in found if job.gpus > gpus]


def _first(job: Job) -> tuple[int, float]:
    """The longest, so that all end at about one time; of those that share no GPU, the widest before."""
    return (-job.gpus if job.slots == jobs.SLOTS else 0), -job.seconds


def listed(found: Sequence[Job]) -> Table:
    made = Table("", "GPUs", "s", "limit", "command")
    for job in found:
        command = " ".join((*job.under, *job.words))
        share = f"{job.gpus}" if job.slots == jobs.SLOTS else f"{job.slots / jobs.SLOTS:.3g} of {job.gpus}"
        made.add_row(job.name, share, f"{job.seconds:.0f}", f"{job.limit:.0f}", command)
    return made


def visible(count: int | None) -> list[str]:
    """The first `count` GPUs, or all, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(gpu) for gpu in range(torch.cuda.device_count())]
    return gpus[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=gpu_jobs.PARTS, default=["checks", "times"])
    parser.add_argument("--gpus", type=_positive, help="use so many; all that torch sees")
    parser.add_argument("--only", nargs="+", default=[], help="jobs of these names; * stands for anything")
    parser.add_argument("--list", action="store_true", help="tell what would run, on --gpus GPUs, and run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpus"), help="emptied first")
    parser.add_argument("--archive", type=Path, help="a zip file of every job's output; FOLDER.zip")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds for everything")
    options = parser.parse_args()
    out = options.out.resolve()
    gpus = [str(gpu) for gpu in range(options.gpus or 1)] if options.list else visible(options.gpus)
    if not gpus:
        sys.exit("on_gpus.py: needs a CUDA device, and torch sees none; on a CPU run `make test`")
    found, wider = chosen(options.part, len(gpus), options.only, out)
    if why := _nothing_of(options.only, found, wider, options.part, len(gpus)):
        sys.exit(f"on_gpus.py: {why}")
    console = Console(width=160)
    if options.list:
        console.print(listed(found))
    console.print(f"{len(found)} jobs, about {forecast(found, gpus):.0f} s on {len(gpus)} GPUs", markup=False)
    if wider:
        console.print("for more GPUs: " + ", ".join(job.name for job in wider), markup=False)
    return 0 if options.list else run(found, gpus, out, options, console)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: give 1 or more")
    return number


def _nothing_of(
    only: Sequence[str], found: Sequence[Job], wider: Sequence[Job], parts: Sequence[str], gpus: int
) -> str | None:
    """Why all jobs, or some that were asked for, would be missing; None if none are."""
    unknown = [repr(name) for name in only if not any(fnmatch(job.name, name) for job in (*found, *wider))]
    if unknown:
        return f"--only {' '.join(unknown)}: no such job in --part {' '.join(parts)}; --list tells their names"
    if not found:
        return f"on {gpus} GPUs there is nothing to run: all {len(wider)} jobs need more; give more, or other --part"
    return None


def run(found: Sequence[Job], gpus: list[str], out: Path, options: argparse.Namespace, console: Console) -> int:
    at = time.monotonic() + options.deadline
    archive = (options.archive or out.with_name(f"{out.name}.zip")).resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    archive.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs `finally`
    console.print(f"{len(gpus)} x {torch.cuda.get_device_name()}, torch {torch.__version__}; whole output in {archive}")
    for vocab in sorted({job.vocab for job in found} - {0}):
        corpus(out, vocab)
    session = Session(gpus, at, out, archive, console)
    try:
        session.play(found)
        for done in gpu_jobs.compare_curves(out):
            session.add(done)
    finally:
        with (out / "table.txt").open("w") as file:
            Console(file=file, width=160).print(jobs.table(session.results))
        session.keep([out / "table.txt", *out.glob("*/*.html")])
        console.print(jobs.table(session.results))
        if late := [repr(done.job.name) for done in session.results if done.outcome == TOO_LATE]:
            console.print(f"for another time: --only {' '.join(late)}", markup=False)
    return 0 if all(done.outcome == "right" for done in session.results) else 1


if __name__ == "__main__":
    sys.exit(main())
