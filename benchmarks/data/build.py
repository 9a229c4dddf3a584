"""What `dryvine data build` takes beside `tokenizers` alone: the same text, tokenizer and cores, in the same run.

    python -m benchmarks.data.build [--megabytes 2000] [--processes 2]

Text is drawn from the standard library's source with words shuffled, as JSON Lines, in a temporary folder; twice the
space is asked for first. "tokenizers" encodes texts that are already in memory, by its own threads, and takes the ids
out: no reading, no JSON, no hashing, no writing. Memory is the largest sum of the resident sets of a process and its
children, asked ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from dryvine.trainer.data.stdlib import stdlib_files
from dryvine.trainer.data.stream import BATCH_BYTES
from dryvine.trainer.data.tokenizer import train


class Measured(NamedTuple):
    what: str
    seconds: float
    peak: float  # bytes
    tokens: int


def write_text(path: Path, megabytes: int) -> None:
    """Documents of a few hundred lines; no two are alike, so no cache of words covers them more than real text."""
    lines = [line for file in stdlib_files() for line in file.path.read_text(errors="replace").splitlines() if line]
    draw, left = random.Random(0), megabytes * 10**6
    with path.open("w") as out:
        while left > 0:
            start = draw.randrange(len(lines) - 400)
            body = lines[start : start + draw.randint(5, 400)]
            draw.shuffle(body)
            left -= out.write(json.dumps({"text": "\n".join(body) + f"\n{draw.random()}"}) + "\n")


def texts(path: Path) -> Iterator[list[str]]:
    """In the batches that a build makes."""
    batch, size = [], 0
    with path.open() as lines:
        for line in lines:
            batch.append(json.loads(line)["text"])
            size += len(batch[-1])
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    yield batch


def alone(path: Path, tokenizer_json: Path) -> None:
    """`tokenizers` in a process of its own; prints seconds without reading, and tokens."""
    tokenizer, seconds, tokens = Tokenizer.from_file(str(tokenizer_json)), 0.0, 0
    for batch in texts(path):
        started = time.perf_counter()
        tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
        seconds += time.perf_counter() - started
    print(json.dumps([seconds, tokens]))


def watched(what: str, command: list[str]) -> Measured:
    """Run a command that prints [seconds, tokens], and look at its memory meanwhile."""
    process, peak = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), 0
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(0.1)
    assert process.stdout
    seconds, tokens = json.loads(process.stdout.read().splitlines()[-1])
    process.stdout.close()
    assert process.returncode == 0, what
    return Measured(what, seconds, peak, tokens)


def _resident(pid: int) -> int:
    """Bytes of a process and its children. Pages that they share are counted for each."""
    found = subprocess.run(["ps", "-o", "rss=", "-p", str(pid), "--ppid", str(pid)], capture_output=True, text=True)
    return 1024 * sum(map(int, found.stdout.split()))


BUILD = """
import json, sys, time
from pathlib import Path
from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec
if __name__ == "__main__":
    started = time.perf_counter()
    spec = BuildSpec(tokenizer=Path(sys.argv[2]))
    made = build(match_files([sys.argv[1]]), spec, Path(sys.argv[3]), processes=int(sys.argv[4]))
    print(json.dumps([time.perf_counter() - started, made.train.tokens + made.val.tokens]))
"""


def measure(folder: Path, megabytes: int, processes: int) -> list[Measured]:
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer.json"
    write_text(text, megabytes)
    train((t for batch, _ in zip(texts(text), range(4), strict=False) for t in batch), 8192).save(str(tokenizer))
    (folder / "build.py").write_text(BUILD)
    found = [watched("tokenizers alone", [sys.executable, "-m", __spec__.name, "--alone", str(text), str(tokenizer)])]
    for count in (1, processes):
        command = [sys.executable, str(folder / "build.py"), str(text), str(tokenizer), str(folder / str(count))]
        found.append(watched(f"dryvine data build --processes {count}", [*command, str(count)]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--alone", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        alone(*given.alone)
        return
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 2 * given.megabytes * 10**6:
            sys.exit(f"{folder}: less than {2 * given.megabytes} MB free; set TMPDIR, or lower --megabytes")
        found = measure(Path(folder), given.megabytes, given.processes)
    machine = f"{os.cpu_count()} cores of {platform.machine()}, load {os.getloadavg()[0]:.0f}"
    print(f"{given.megabytes} MB of JSON Lines, {machine}")
    for row in found:
        rate = row.tokens / row.seconds / 1e6
        ratio = found[0].seconds / row.seconds
        print(
            f"{row.what:34} {row.seconds:8.1f} s {rate:6.2f} M tokens/s {ratio:6.2f} of alone {row.peak / 1e6:7.0f} MB"
        )


if __name__ == "__main__":
    main()
