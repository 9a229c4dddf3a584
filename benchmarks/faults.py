"""Ranks that are killed, stopped, fail or leave: is each named, is the job over in time, does it go on where it was?

    python -m benchmarks.faults [--device cpu] [--section ops|resume] [--deadline 8] [--together 3] [--out FOLDER]

`ops`: two ranks talk (`support.lost_rank`) and rank 1 is lost in a pipeline receive, an all-to-all or a reduction.
`resume`: `dryvine train` on two ranks, of which one is killed or stopped in the middle; the same command then goes on,
and the loss of every step must have the bits of a run that nobody disturbed. Each job's output goes to FOLDER. Exits
with 1 unless every culprit is named, every job ends with an error within its deadline + 10 s, and every loss agrees.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dryvine.trainer import run_rows

ROOT = Path(__file__).parents[1]
GRACE = 10.0  # seconds after the deadline in which a job must have ended
START = 120.0  # seconds that a job gets before its rank is lost
OPERATIONS = {
    "receive": "receiving gradients",
    "receive NCCL": "receiving gradients",
    "all-to-all": "(combine|routing) of",  # a rank that leaves does so before it routes
    "reduction": "sum of",
}
FAULTS = {
    "kill": "rank {} did not answer the roll call",
    "stop": "rank {} did not answer the roll call",
    "raise": r"rank {} failed: ValueError: layers\.3 exploded",
    "leave": "rank {} left before the others",
}
LAYOUTS = {
    "pp 2, dualpipe": ("parallel.pp=2", "parallel.ep=1"),
    "ep 2": ("parallel.pp=1", "parallel.ep=2", "parallel.schedule=one_f_one_b"),
    "dp 2": ("parallel.pp=1", "parallel.ep=1", "parallel.dp=2", "parallel.schedule=one_f_one_b"),
}
STEPS, CHECKPOINT, LOST_AFTER = 40, 10, 15


@dataclass(frozen=True)
class Run:
    device: str
    deadline: float
    out: Path


@dataclass(frozen=True)
class Finding:
    job: str
    named: bool  # the culprit
    late: float  # seconds from the deadline to the end of the job
    code: int
    note: str = ""

    @property
    def fine(self) -> bool:
        return self.named and self.late <= GRACE and self.code != 0 and not self.note.startswith("WRONG")


class Job:
    """A command in a session of its own, whose output goes to a file."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.log = log
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                words, stdout=out, stderr=out, cwd=ROOT, env=environment, start_new_session=True
            )

    def wait(self, seconds: float) -> int:
        """Its exit code; past the time it is killed with all that it started."""
        try:
            return self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.wait()

    def kill(self) -> None:
        for pid in [*self.ranks().values(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ranks(self) -> dict[int, int]:
        """Process ids by rank: children that a launcher gave one."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                rank = re.search(rb"(?:^|\0)LOCAL_RANK=(\d+)\0", (path / "environ").read_bytes())
                if rank and parent == self.process.pid:
                    found[int(rank[1])] = int(path.name)
        return found


def operation(run: Run, what: str, fault: str) -> Finding:
    folder = run.out / f"{what}-{fault}".replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    script = ("-m", "benchmarks.support.lost_rank", what, fault, run.device, str(run.deadline), str(folder))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    job = Job((sys.executable, *torchrun, *script), folder / "log.txt")
    begun, down = time.time(), folder / "down"
    while not down.exists() and job.process.poll() is None and time.time() < begun + START:
        time.sleep(0.02)
    if not down.exists():
        job.kill()
        return Finding(f"{what}, {fault}", False, 0.0, job.wait(5), f"WRONG: rank 1 was never lost, see {job.log}")
    lost = float(down.read_text() or time.time())
    code = job.wait(lost + run.deadline + 90 - time.time())
    said = job.log.read_text()
    verdict = rf"rank 0: {OPERATIONS[what]}.* microbatch 2.*{FAULTS[fault].format(1)}"
    return Finding(f"{what}, {fault}", bool(re.search(verdict, said)), time.time() - lost - run.deadline, code)


def training(run: Run, layout: str, name: str) -> tuple[tuple[str, ...], Path]:
    """The command of a run in that layout, and its folder."""
    settings = (
        f"run.steps={STEPS}", f"run.checkpoint_every={CHECKPOINT}", f'run.device="{run.device}"', f'run.name="{name}"',
        f'run.out="{run.out}"', f"comm.deadline={run.deadline}", "run.eval_every=1000", "batch.sequences=8",
        "data.source=stdlib", "data.vocab_size=320",
    )  # fmt: skip
    start = "from dryvine.launch.cli import main; main()"
    words = (sys.executable, "-c", start, "train", "tests/tiny.toml", *settings, *LAYOUTS[layout])
    return words, run.out / name


def losses(folder: Path) -> list[float]:
    """Of a run that goes on, or was killed while it wrote one."""
    return [row["loss"] for row in run_rows.read(folder)]


def resume(run: Run, layout: str) -> list[Finding]:
    """Lose rank 0 or rank 1, by either signal, and go on: four runs against one that is left alone."""
    plain = layout.replace(",", "").replace(" ", "-")
    words, folder = training(run, layout, plain)
    if code := Job(words, run.out / f"{plain}.txt").wait(2 * START):
        return [Finding(f"train, {layout}", False, 0.0, code, f"WRONG: failed by itself, see {plain}.txt")]
    return [_resumed(run, layout, fault, rank, losses(folder)) for fault, rank in product(("kill", "stop"), (1, 0))]


def _resumed(run: Run, layout: str, fault: str, rank: int, expected: list[float]) -> Finding:
    title = f"train, {layout}, {fault} rank {rank}"
    name = re.sub(r"\W+", "-", title)
    words, folder = training(run, layout, name)
    job = Job(words, run.out / f"{name}.txt")
    begun = time.time()
    while len(losses(folder)) < LOST_AFTER and job.process.poll() is None and time.time() < begun + START:
        time.sleep(0.005)
    pids = job.ranks()
    if rank not in pids:
        job.kill()
        return Finding(title, False, 0.0, job.wait(5), f"WRONG: it was over before, see {job.log}")
    os.kill(pids[rank], {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])
    lost = time.time()
    code = job.wait(run.deadline + 90)
    late = time.time() - lost - run.deadline
    named = bool(re.search(FAULTS[fault].format(rank), job.log.read_text()))
    before = len(losses(folder))
    again = Job(words, run.out / f"{name}-resumed.txt").wait(2 * START)
    same = losses(folder) == expected and again == 0
    note = f"lost after step {before}, resumed: " + ("same losses" if same else "other losses")
    return Finding(title, named, late, code, note if same else f"WRONG: {note}")


def table(findings: Sequence[Finding], run: Run) -> Table:
    made = Table(title=f"{run.device}, deadline {run.deadline:g} s: lost ranks")
    for column in ("job", "culprit named", "s after the deadline", "exit code", "note"):
        made.add_column(column)
    for f in findings:
        style = None if f.fine else "red"
        made.add_row(f.job, "yes" if f.named else "NO", f"{f.late:+.1f}", str(f.code), f.note, style=style)
    return made


def findings(run: Run, sections: Sequence[str], together: int, only: str = "") -> list[Finding]:
    """Of the sections' jobs, `together` at a time; of `ops`, those whose name has `only`."""
    found: list[Finding] = []
    with ThreadPoolExecutor(together) as pool:
        if "ops" in sections:
            whats = [what for what in OPERATIONS if run.device == "cuda" or what != "receive NCCL"]
            pairs = [(what, fault) for what, fault in product(whats, FAULTS) if only in f"{what}, {fault}"]
            found += pool.map(lambda pair: operation(run, *pair), pairs)
        if "resume" in sections:
            for resumed in pool.map(lambda layout: resume(run, layout), LAYOUTS):
                found += resumed
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--section", choices=["ops", "resume"], action="append")
    parser.add_argument("--deadline", type=float, default=8.0)
    parser.add_argument("--together", type=int, default=3, help="jobs at a time")
    parser.add_argument("--only", default="", help="jobs of `ops` whose name has this")
    parser.add_argument("--out", type=Path, help="a folder for every job's output, emptied first")
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="dryvine-faults-"))
    shutil.rmtree(out, ignore_errors=True)  # an earlier run's files say when its ranks were lost
    out.mkdir(parents=True)
    run = Run(given.device, given.deadline, out.resolve())
    results = findings(run, given.section or ["ops", "resume"], given.together, given.only)
    Console(width=None if sys.stdout.isatty() else 140).print(table(results, run))
    print(f"output in {out}; {sum(f.fine for f in results)} of {len(results)} as they should be")
    return 0 if all(f.fine for f in results) else 1


if __name__ == "__main__":
    sys.exit(main())
