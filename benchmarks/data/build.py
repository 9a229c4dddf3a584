"""What `dryvine data build` takes beside `tokenizers` alone: the same text, tokenizer and cores, in the same run.

    python -m benchmarks.data.build [--megabytes 2000] [--processes 2] [--datatrove PYTHON]

Text is drawn from the standard library's source with words shuffled, as JSON Lines, one file a process, in a temporary
folder; twice the space is asked for first. "tokenizers" encodes texts that are already in memory, by its own threads,
and takes the ids out: no reading, no JSON, no hashing, no writing. `--datatrove` names a Python that has it (`pip
install "datatrove[io]" tokenizers humanize`), and its DocumentTokenizer, unshuffled, does the same job.

Seconds depend on what else the machine does; CPU seconds, of a process and its children, hardly do, and with them the
ratio can be read on a machine that is not idle. Memory is the largest sum of the resident sets of a process and its
children, looked at ten times a second (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from dryvine.trainer.data.stdlib import stdlib_files
from dryvine.trainer.data.stream import BATCH_BYTES
from dryvine.trainer.data.tokenizer import learn_tokenizer


class Measured(NamedTuple):
    what: str
    seconds: float
    cpu: float  # seconds
    tokens: int
    peak: float  # bytes


def write_text(folder: Path, megabytes: int, files: int) -> None:
    """Documents of a few hundred lines; no two are alike, so no cache of words covers them more than real text."""
    lines = [line for file in stdlib_files() for line in file.path.read_text(errors="replace").splitlines() if line]
    for number in range(files):
        _write_file(folder / f"{number}.jsonl", lines, megabytes * 10**6 // files, random.Random(number))


def _write_file(path: Path, lines: list[str], left: int, draw: random.Random) -> None:
    with path.open("w") as out:
        while left > 0:
            start = draw.randrange(len(lines) - 400)
            body = lines[start : start + draw.randint(5, 400)]
            draw.shuffle(body)
            left -= out.write(json.dumps({"text": "\n".join(body) + f"\n{draw.random()}"}) + "\n")


def texts(folder: Path) -> Iterator[list[str]]:
    """In the batches that a build makes."""
    batch, size = [], 0
    for path in sorted(folder.glob("*.jsonl")):
        with path.open() as lines:
            for line in lines:
                batch.append(json.loads(line)["text"])
                size += len(batch[-1])
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
    yield batch


def alone(folder: Path, tokenizer_json: Path) -> None:
    """`tokenizers` in a process of its own; prints its seconds and CPU seconds without reading, and tokens."""
    tokenizer, seconds, cpu, tokens = Tokenizer.from_file(str(tokenizer_json)), 0.0, 0.0, 0
    for batch in texts(folder):
        started, burnt = time.perf_counter(), time.process_time()
        tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
        seconds, cpu = seconds + time.perf_counter() - started, cpu + time.process_time() - burnt
    print(json.dumps([seconds, cpu, tokens]))


def watched(what: str, command: list[str]) -> Measured:
    """Run a command that prints [seconds, CPU seconds, tokens], and look at its memory meanwhile."""
    process, peak = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), 0
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(0.1)
    assert process.stdout
    printed = process.stdout.read().splitlines()
    process.stdout.close()
    if process.returncode:
        sys.exit(f"{what}: exit code {process.returncode}")
    return Measured(what, *json.loads(printed[-1]), peak)


def _resident(pid: int) -> int:
    """Bytes of a process and its children. Pages that they share are counted for each."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pages = [int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in (pid, *children)]
    except OSError:  # one has just ended
        return 0
    return resource.getpagesize() * sum(pages)


CPU = """
import json, resource, sys, time
def cpu():
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in each)
"""
BUILD = """
from pathlib import Path
from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec
if __name__ == "__main__":
    started, burnt = time.perf_counter(), cpu()
    spec = BuildSpec(tokenizer=Path(sys.argv[2]))
    made = build(match_files([f"{sys.argv[1]}/*.jsonl"]), spec, Path(sys.argv[3]), processes=int(sys.argv[4]))
    print(json.dumps([time.perf_counter() - started, cpu() - burnt, made.train.tokens + made.val.tokens]))
"""
DATATROVE = """
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    started, burnt = time.perf_counter(), cpu()
    text, tokenizer, out, count = sys.argv[1:]
    writer = DocumentTokenizer(out, tokenizer, eos_token="<|endoftext|>", shuffle_documents=False)
    pipeline = [JsonlReader(text, glob_pattern="*.jsonl"), writer]
    # Forked, so that what its workers burn is counted as this process's children's.
    options = dict(tasks=int(count), workers=int(count), logging_dir=out + "/log", start_method="fork")
    stats = LocalPipelineExecutor(pipeline, **options).run()
    tokens = next(step.stats["tokens"].total for step in stats.stats if "tokens" in step.stats)
    print(json.dumps([time.perf_counter() - started, cpu() - burnt, tokens]))
"""


def measure(folder: Path, given: argparse.Namespace) -> Iterator[Measured]:
    text, tokenizer, processes = folder / "text", folder / "tokenizer.json", str(given.processes)
    text.mkdir()
    write_text(text, given.megabytes, given.processes)
    learn_tokenizer((t for batch, _ in zip(texts(text), range(4), strict=False) for t in batch), 8192).save(
        str(tokenizer)
    )
    (folder / "build.py").write_text(CPU + BUILD)
    (folder / "peer.py").write_text(CPU + DATATROVE)
    both = [str(text), str(tokenizer)]
    yield watched("tokenizers alone", [sys.executable, "-m", __spec__.name, "--alone", *both])
    for count in dict.fromkeys(("1", processes)):
        command = [sys.executable, str(folder / "build.py"), *both, str(folder / count), count]
        yield watched(f"dryvine data build --processes {count}", command)
    if given.datatrove:
        command = [given.datatrove, str(folder / "peer.py"), *both, str(folder / "peer"), processes]
        yield watched(f"datatrove, {processes} workers", command)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--datatrove", help="a Python that has it")
    parser.add_argument("--alone", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        alone(*given.alone)
        return
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 2 * given.megabytes * 10**6:
            sys.exit(f"{folder}: less than {2 * given.megabytes} MB free; set TMPDIR, or lower --megabytes")
        report(measure(Path(folder), given), given.megabytes)


def report(rows: Iterable[Measured], megabytes: int) -> None:
    """A line for each as soon as it is known; the first is what the others are compared with."""
    machine = f"{os.cpu_count()} cores of {platform.machine()}, load {os.getloadavg()[0]:.0f}"
    print(f"{megabytes} MB of JSON Lines, {machine}")
    print(f"{'':34} {'s':>8} {'of alone':>9} {'CPU s':>8} {'of alone':>9} {'M tokens/s':>11} {'peak MB':>8}")
    first = None
    for row in rows:
        first = first or row
        print(
            f"{row.what:34} {row.seconds:8.1f} {row.seconds / first.seconds:9.2f} {row.cpu:8.1f} "
            f"{row.cpu / first.cpu:9.2f} {row.tokens / row.seconds / 1e6:11.2f} {row.peak / 1e6:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
