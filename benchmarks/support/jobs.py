"""Jobs side by side on the GPUs of one host: processes with deadlines, what they say, and an archive of all of it.

A GPU has a few slots. A check takes some of them, so that several share a GPU, and what is timed takes all. Jobs start
in the order given; one that finds no room holds back those behind it, so that no GPU is taken from a job of several.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parents[2]
SLOTS = 8  # of a GPU
MARK = "DRYVINE_BENCHMARK_JOB"
SHOWN = 15  # lines of a job
TOO_LATE = "not begun: no time left"


@dataclass(frozen=True)
class Job:
    name: str
    words: tuple[str, ...]  # for Python
    seconds: float  # that it takes on an H100, about
    show: str  # pattern of the lines that matter; the last of them goes into the table
    gpus: int = 1
    slots: int = SLOTS  # of each of its GPUs
    wrong: str = ""  # pattern of lines that say that it went wrong, whatever its exit code
    under: tuple[str, ...] = ()  # what runs Python
    vocab: int = 0  # of the corpus that it reads, which is built before all jobs; 0 if it reads none

    @property
    def limit(self) -> float:
        """Seconds after which it is ended. A check that hangs holds up little, and may compile beside others."""
        return (2 if self.slots == SLOTS else 3) * self.seconds + 40

    @property
    def slug(self) -> str:
        """Its files are SLUG.txt and whatever it writes as SLUG.*"""
        return re.sub(r"\W+", "_", self.name)


@dataclass(frozen=True)
class Done:
    job: Job
    outcome: str  # right, or what went wrong
    seconds: float
    lines: list[str]


class Lanes:
    """Which slots of which GPUs are free. `gpus` are named as CUDA_VISIBLE_DEVICES names them."""

    def __init__(self, gpus: Sequence[str]) -> None:
        self.free = dict.fromkeys(gpus, SLOTS)

    def take(self, job: Job) -> tuple[str, ...] | None:
        """The neighbours with the most room, if it is enough."""
        gpus = list(self.free)
        groups = [tuple(gpus[at : at + job.gpus]) for at in range(0, len(gpus) - job.gpus + 1, job.gpus)]
        room, best = max(((min(self.free[gpu] for gpu in group), group) for group in groups), key=lambda pair: pair[0])
        if room < job.slots:
            return None
        for gpu in best:
            self.free[gpu] -= job.slots
        return best

    def give(self, job: Job, gpus: tuple[str, ...]) -> None:
        for gpu in gpus:
            self.free[gpu] += job.slots


def forecast(jobs: Iterable[Job], gpus: Sequence[str]) -> float:
    """Seconds of all jobs, if each takes as long as it says."""
    lanes, now, running, number = Lanes(gpus), 0.0, list[tuple[float, int, Job, tuple[str, ...]]](), count()
    for job in jobs:
        while (taken := lanes.take(job)) is None:
            now, _, ended, given = heapq.heappop(running)
            lanes.give(ended, given)
        heapq.heappush(running, (now + job.seconds, next(number), job, taken))
    return max((end for end, *_ in running), default=now)


class Running:
    """A job's process, and all that it starts."""

    def __init__(self, job: Job, gpus: tuple[str, ...], threads: int, out: Path) -> None:
        self.job, self.gpus, self.started = job, gpus, time.monotonic()
        self.log = out / f"{job.slug}.txt"
        self.mark = f"{MARK}={os.getpid()} {job.slug}"
        paths = (str(ROOT / ".typing"), str(ROOT), os.environ.get("PYTHONPATH", ""))
        own = {
            MARK: self.mark.partition("=")[2],
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": ":".join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
        }
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [*job.under, sys.executable, *job.words],
                cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | own,
            )  # fmt: skip

    def over(self, at: float) -> Done | None:
        """Its result, if it has ended, or if `at` (of `time.monotonic`) or its own limit has passed."""
        code, now = self.process.poll(), time.monotonic()
        if code is None and now < min(at, self.started + self.job.limit):
            return None
        self.kill()
        return self.done("out of time" if code is None else _ended(code))

    def done(self, outcome: str) -> Done:
        lines = self.log.read_text(errors="replace").splitlines()
        if outcome == "right" and self.job.wrong and any(re.search(self.job.wrong, line) for line in lines):
            outcome = "WRONG"
        asked = f"{self.job.show}|{self.job.wrong}" if self.job.wrong else self.job.show
        matching = [line.strip() for line in lines if re.search(asked, line)]
        return Done(self.job, outcome, time.monotonic() - self.started, matching or [li for li in lines if li][-1:])

    def kill(self) -> None:
        """Kill the process and everything it started. Ranks of torchrun are in sessions of their own and may have lost
        their parent, so they are found by the job's mark in their environment."""
        if self.process.returncode is None:  # once it is reaped its number may be another's
            os.killpg(self.process.pid, signal.SIGKILL)
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                    os.kill(int(path.name), signal.SIGKILL)
        self.process.wait()


def _ended(code: int) -> str:
    if code < 0:
        return f"killed by signal {-code}"
    return f"exit {code}" if code else "right"


class Session:
    """Runs jobs until `at` (of `time.monotonic`): their output goes to the folder `out`, and as they end into the zip
    file `archive`, which is complete at every moment, since whoever runs this may be ended at any."""

    def __init__(self, gpus: Sequence[str], at: float, out: Path, archive: Path, console: Console) -> None:
        self.lanes, self.at, self.out, self.archive, self.console = Lanes(gpus), at, out, archive, console
        self.results: list[Done] = []
        self._cores = (os.cpu_count() or 1) / len(gpus) / SLOTS  # of a slot

    def play(self, jobs: Iterable[Job]) -> None:
        """However this ends, no process is left. A job that cannot end in time, or whose tool is missing, is not
        started."""
        waiting, running = deque(jobs), list[Running]()
        try:
            while waiting or running:
                while waiting and self._begin(waiting[0], running):
                    waiting.popleft()
                for one in list(running):
                    if done := one.over(self.at):
                        running.remove(one)
                        self.lanes.give(one.job, one.gpus)
                        self.add(done)
                time.sleep(0.1)
        finally:
            for one in running:
                one.kill()
                self.add(one.done("stopped"))

    def _begin(self, job: Job, running: list[Running]) -> bool:
        """Whether the job needs to wait no longer: it has been started, or told not to be."""
        if job.under and not shutil.which(job.under[0]):
            self.add(Done(job, "not run", 0.0, [f"{job.under[0]} is not on PATH"]))
        elif time.monotonic() + job.seconds > self.at:
            self.add(Done(job, TOO_LATE, 0.0, []))
        elif gpus := self.lanes.take(job):
            running.append(Running(job, gpus, max(1, int(self._cores * job.slots * job.gpus)), self.out))
        else:
            return False
        return True

    def add(self, done: Done) -> None:
        """Show what a job has said, and archive its files."""
        self.results.append(done)
        self.console.print(f"-- {done.job.name}: {done.outcome}, {done.seconds:.0f} s", markup=False)
        for line in done.lines[-SHOWN:]:
            self.console.print(f"   {line}", markup=False, highlight=False, no_wrap=True, crop=False)
        self.keep(self.out.glob(f"{done.job.slug}.*"))

    def keep(self, files: Iterable[Path]) -> None:
        """By a copy: whatever is appended overwrites the archive's list of its files, which is written last."""
        longer = self.archive.with_name(f"{self.archive.name}.part")
        longer.unlink(missing_ok=True)
        if self.archive.exists():
            shutil.copyfile(self.archive, longer)
        with zipfile.ZipFile(longer, "a", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(files):
                archive.write(path, path.relative_to(self.out))
        longer.replace(self.archive)


def table(results: Sequence[Done]) -> Table:
    made = Table("", "", "s", "about", "last line")
    for done in results:
        last = done.lines[-1][:90] if done.lines else ""
        made.add_row(done.job.name, done.outcome, f"{done.seconds:.0f}", f"{done.job.seconds:.0f}", escape(last))
    return made
