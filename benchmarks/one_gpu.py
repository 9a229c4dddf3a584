"""Everything that is to be checked and measured on one Hopper GPU, in ten minutes: checks side by side, then times.

    python -m benchmarks.one_gpu [--out FOLDER] [--deadline SECONDS]

Each job is a process with a deadline of its own, whose whole output goes to FOLDER/<job>.txt; the lines that matter are
printed as it ends, and a table of all jobs comes last. A job that fails or is late does not stop the others. Exits with
1 unless all were right. Needs the project's packages and pytest; without `compute-sanitizer` or transformers, their
jobs report that.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parents[1]
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")
RANK = "tests/trainer/test_one_rank_schedules.py"


TESTED = r"^E  |^FAILED|\d passed|\d failed|no tests ran"


def bench(name: str) -> tuple[str, str]:
    return "-m", f"benchmarks.{name}"


@dataclass(frozen=True)
class Job:
    name: str
    words: tuple[str, ...]  # for Python
    seconds: float
    show: str  # pattern of the lines that matter; the last of them goes into the table
    under: tuple[str, ...] = ()  # what runs Python


def checks(out: Path) -> list[Job]:
    every = ("-m", "tests.spawned.kernels_sanitized")
    memcheck = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    debug = ("-m", "dryvine.trainer", "configs/debug_1gpu.toml", f"run.out={out}")
    return [
        Job("model", (*PYTEST, "tests/trainer/test_model_cuda.py"), 200, TESTED),
        Job("comm", (*PYTEST, "tests/comm/test_dispatch_cuda.py", "tests/trainer/test_fp8_dispatch.py"), 200, TESTED),
        Job("same bits twice", (*PYTEST, RANK, "-k", "same_run"), 200, TESTED),
        Job("same bits overlapped", (*PYTEST, RANK, "-k", "overlap_does"), 200, TESTED),
        Job("every schedule", (*PYTEST, RANK, "-k", "not same_run and not overlap_does"), 200, TESTED),
        Job(
            "casts and products",
            (*bench("fp8.kernels"), "--section", "check"),
            200,
            r"^casts:|^products:|DIFFERS|WRONG",
        ),
        Job("memcheck", every, 240, r"kernels ran|ERROR SUMMARY|not run", memcheck),
        Job("debug_1gpu", debug, 200, r"tokens/s|loss  "),
    ]


TIMES = [
    Job("FP8 products", (*bench("fp8.kernels"), "--section", "product"), 100, r"^limits|^  \d"),
    Job("FP8 weight gradients", (*bench("fp8.kernels"), "--section", "wgrad"), 60, r"^  \d"),
    Job("FP8 casts", (*bench("fp8.kernels"), "--section", "casts"), 60, r"%"),
    Job(
        "overlap",
        (*bench("overlap.pairs"), "--device=cuda", "--phase-ms=3"),
        70,
        r"host time|(FB|FF|BB|FW|IW) ",
    ),
    Job("layer", (*bench("model.layer"), "--device=cuda"), 70, r"a microbatch, ideal"),
    Job("memory", (*bench("model.memory"), "--device=cuda"), 40, r"layers\.\d"),
    Job(
        "beside transformers",
        (*bench("model.peer"), "--device=cuda", "--deadline=190"),
        200,
        r"│ (dry|trans)|: .*rror",
    ),
]


@dataclass(frozen=True)
class Done:
    job: Job
    outcome: str  # right, or what went wrong
    seconds: float
    lines: list[str]


class Running:
    """A job's process, in a process group of its own, so that what it has started ends with it."""

    def __init__(self, job: Job, out: Path) -> None:
        self.job, self.started = job, time.monotonic()
        self.log = out / f"{job.name.replace(' ', '_')}.txt"
        paths = (str(ROOT / ".typing"), str(ROOT), os.environ.get("PYTHONPATH", ""))
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [*job.under, sys.executable, *job.words],
                cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PYTHONPATH": ":".join(filter(None, paths)), "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    def over(self, at: float) -> Done | None:
        """Its result, if it has ended, or if `at` (of `time.monotonic`) or its own deadline has passed."""
        code, now = self.process.poll(), time.monotonic()
        if code is None and now < min(at, self.started + self.job.seconds):
            return None
        self.kill()
        outcome = "out of time" if code is None else f"exit {code}" if code else "right"
        lines = self.log.read_text(errors="replace").splitlines()
        matching = [line.strip() for line in lines if re.search(self.job.show, line)]
        return Done(self.job, outcome, now - self.started, matching or [line for line in lines if line][-1:])

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def play(jobs: Iterable[Job], at_once: int, at: float, out: Path, console: Console) -> list[Done]:
    """Run the jobs, `at_once` side by side, until `at`; a job whose tool is missing is not started. However this
    ends, no process is left."""
    results: list[Done] = []
    waiting, running = deque(jobs), list[Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                if job.under and not shutil.which(job.under[0]):
                    results.append(Done(job, "not run", 0.0, [f"{job.under[0]} is not on PATH"]))
                else:
                    running.append(Running(job, out))
            for one in list(running):
                if done := one.over(at):
                    running.remove(one)
                    results.append(done)
                    _show(done, console)
            time.sleep(0.1)
    finally:
        for one in running:
            one.kill()
    return results


def _show(done: Done, console: Console) -> None:
    console.print(f"-- {done.job.name}: {done.outcome}, {done.seconds:.0f} s", markup=False)
    for line in done.lines:
        console.print(f"   {line}", markup=False, highlight=False, no_wrap=True)


def table(results: Sequence[Done]) -> Table:
    made = Table("", "", "s", "last line")
    for done in results:
        last = done.lines[-1][:90] if done.lines else ""
        made.add_row(done.job.name, done.outcome, f"{done.seconds:.0f}", escape(last))
    return made


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/one_gpu"), help="a folder for every job's whole output")
    parser.add_argument("--deadline", type=float, default=580, help="seconds for everything")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("one_gpu.py: needs a CUDA device, and torch sees none; on a CPU run `make test`")
    out, at = options.out.resolve(), time.monotonic() + options.deadline
    out.mkdir(parents=True, exist_ok=True)
    # A finished run would resume at its end, and print nothing.
    shutil.rmtree(out / "debug_1gpu", ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs `finally`
    console = Console(width=160)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; whole output in {out}")
    results = play(checks(out), 8, at, out, console) + play(TIMES, 1, at, out, console)
    console.print(table(results))
    return 0 if all(done.outcome == "right" for done in results) else 1


if __name__ == "__main__":
    sys.exit(main())
