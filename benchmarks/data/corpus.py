"""Text for benchmarks of builds: lines of the standard library's source, shuffled, as JSON Lines."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from dryvine.trainer.data.stdlib import stdlib_files

FILES = 48  # divides evenly among 1, 2, 3, 4, 6, 8, 12, 16 or 24 processes


def write_corpus(folder: Path, megabytes: int) -> None:
    """Documents of a few hundred lines; no two are alike, so no cache of words covers them more than real text. The
    same text for the same size on any machine with the same standard library; written on all cores."""
    folder.mkdir()
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(_write_file, folder, megabytes * 10**6 // FILES), range(FILES)))


def _write_file(folder: Path, left: int, number: int) -> None:
    lines = [line for file in stdlib_files() for line in file.path.read_text(errors="replace").splitlines() if line]
    draw = random.Random(number)
    with (folder / f"{number:02}.jsonl").open("w") as out:
        while left > 0:
            start = draw.randrange(len(lines) - 400)
            body = lines[start : start + draw.randint(5, 400)]
            draw.shuffle(body)
            left -= out.write(json.dumps({"text": "\n".join(body) + f"\n{draw.random()}"}) + "\n")


def corpus_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def texts(files: Sequence[Path], characters: int) -> Iterator[list[str]]:
    """The documents of some files, in lists of about so many characters."""
    batch, size = [], 0
    for path in files:
        with path.open() as lines:
            for line in lines:
                batch.append(json.loads(line)["text"])
                size += len(batch[-1])
                if size >= characters:
                    yield batch
                    batch, size = [], 0
    yield batch
