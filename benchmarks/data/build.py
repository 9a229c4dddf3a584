"""What `dryvine data build` takes beside `tokenizers` alone: the same text, tokenizer and cores, in the same run.

    python -m benchmarks.data.build [--megabytes 2000] [--processes 8] [--rows threads dryvine] [--datatrove PYTHON]

Text is drawn from the standard library's source with lines shuffled, as JSON Lines, in a temporary folder; twice the
space is asked for first. Every row then has the same first `--processes` CPUs of this machine, and as many threads,
processes or workers. Rows (`row.py`):

threads    `tokenizers` as it is used: texts that are in memory, a batch a call, its own threads, the ids taken out.
           No reading, no JSON, no hashing, no writing. What the others are compared with.
shares     `tokenizers` at its fastest: a process a core, few texts a call.
dryvine    `dryvine data build --processes N`
datatrove  its DocumentTokenizer, unshuffled, by N workers. `--datatrove` names a Python that has it (`pip install
           datatrove tokenizers humanize orjson`)

A row is printed as soon as it is done; one that is not done `--deadline` seconds after the start is ended, and says so.
Seconds depend on what else the machine does; CPU seconds, of a process and its children, hardly do, and with them the
ratio can be read on a machine that is not idle. Memory is the largest sum of the resident sets of a process and its
children, looked at ten times a second (Linux).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers

from benchmarks.data.corpus import corpus_files, texts, write_corpus
from dryvine.trainer.data.stream import BATCH_BYTES
from dryvine.trainer.data.tokenizer import learn_tokenizer

ROWS = {
    "threads": "tokenizers alone, {} threads",
    "shares": "tokenizers alone, {} processes",
    "dryvine": "dryvine data build --processes {}",
    "datatrove": "datatrove, {} workers",
}
SAMPLE_BATCHES = 4  # of 4 MiB, for the vocabulary


class Measured(NamedTuple):
    seconds: float
    cpu: float  # seconds
    tokens: int
    peak: float  # bytes


def prepare(folder: Path, megabytes: int) -> None:
    """Text, and a tokenizer learned from its beginning."""
    write_corpus(folder / "text", megabytes)
    sample = itertools.islice(texts(corpus_files(folder / "text"), BATCH_BYTES), SAMPLE_BATCHES)
    learn_tokenizer(itertools.chain.from_iterable(sample), 8192).save(str(folder / "tokenizer.json"))


def measure(name: str, folder: Path, given: argparse.Namespace, until: float) -> Measured | None:
    """A row in processes of its own, or None if it was not done by `until` (of `time.monotonic`)."""
    words = [str(folder), str(given.processes)]
    if name == "datatrove":
        command = [given.datatrove, str(Path(__file__).with_name("datatrove_row.py")), *words]
    else:
        command = [sys.executable, "-m", "benchmarks.data.row", name, *words]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
    try:
        row = _watched(process, until)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder / "out", ignore_errors=True)
    if process.returncode > 0:
        sys.exit(f"{(folder / 'log').read_text()[-2000:]}\n{name}: exit code {process.returncode}")
    return row


def _watched(process: subprocess.Popen[str], until: float) -> Measured | None:
    peak = 0
    while process.poll() is None:
        if time.monotonic() > until:
            return None
        peak = max(peak, _resident(process.pid))
        time.sleep(0.1)
    assert process.stdout
    printed = process.stdout.read().splitlines()
    return Measured(*json.loads(printed[-1]), peak) if printed else None


def _resident(pid: int) -> int:
    """Bytes of a process and its children. Pages that they share are counted for each."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pages = [int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in (pid, *children)]
    except OSError:  # one has just ended
        return 0
    return resource.getpagesize() * sum(pages)


def report(folder: Path, given: argparse.Namespace, until: float) -> Iterator[str]:
    """The lines of the table, each as soon as it is known."""
    yield f"{given.megabytes} MB of JSON Lines, {_machine()}, tokenizers {tokenizers.__version__}"
    yield f"{'':34} {'s':>8} {'of alone':>9} {'CPU s':>8} {'of alone':>9} {'M tokens/s':>11} {'peak MB':>8} {'load':>5}"
    first = None
    for name in given.rows:
        row = measure(name, folder, given, until)
        label = ROWS[name].format(given.processes)
        if row is None:
            sys.exit(f"{label}: not done at the deadline of {given.deadline:.0f} s")
        first = first or row
        yield (
            f"{label:34} {row.seconds:8.1f} {row.seconds / first.seconds:9.2f} {row.cpu:8.1f} "
            f"{row.cpu / first.cpu:9.2f} {row.tokens / row.seconds / 1e6:11.2f} {row.peak / 1e6:8.0f} "
            f"{os.getloadavg()[0]:5.1f}"
        )


def _machine() -> str:
    """The CPUs that are used, and what the processor calls itself (Linux)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cpus = len(os.sched_getaffinity(0))
    return f"{cpus} of {os.cpu_count()} CPUs ({next(named, platform.machine())})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--processes", type=int, default=cores, choices=range(1, cores + 1), metavar="N")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="all by default, in this order")
    parser.add_argument("--datatrove", metavar="PYTHON", help="one that has it")
    parser.add_argument("--deadline", type=float, default=4 * 3600, metavar="SECONDS", help="of all rows together")
    given = parser.parse_args()
    given.rows = given.rows or [name for name in ROWS if name != "datatrove" or given.datatrove]
    if "datatrove" in given.rows and not given.datatrove:
        parser.error("the row datatrove needs --datatrove PYTHON")
    return given


def main() -> None:
    given = arguments()
    until = time.monotonic() + given.deadline
    with tempfile.TemporaryDirectory() as name:
        if shutil.disk_usage(name).free < 2 * given.megabytes * 10**6:
            sys.exit(f"{name}: less than {2 * given.megabytes} MB free; set TMPDIR, or lower --megabytes")
        folder = Path(name)
        prepare(folder, given.megabytes)
        print(f"text and tokenizer in {time.monotonic() - until + given.deadline:.0f} s", flush=True)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.processes])
        for line in report(folder, given, until):
            print(line, flush=True)


if __name__ == "__main__":
    main()
