"""One row of `benchmarks.data.build` in a process of its own: `python -m benchmarks.data.row NAME FOLDER PROCESSES`.

FOLDER has `text` and `tokenizer.json`. Prints [seconds, CPU seconds, tokens] as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.data.corpus import corpus_files, texts
from dryvine.trainer.data.build import build
from dryvine.trainer.data.encoding_process import CALL_CHARACTERS
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec
from dryvine.trainer.data.stream import BATCH_BYTES

Row = tuple[float, float, int]  # seconds, CPU seconds, tokens


def threads(folder: Path, processes: int) -> Row:
    """`tokenizers` as most use it: one process, its own threads, a batch a call. Reading does not count."""
    os.environ["RAYON_NUM_THREADS"] = str(processes)
    return _encode(folder, BATCH_BYTES, (0, 1))


def shares(folder: Path, processes: int) -> Row:
    """`tokenizers` at its fastest: a process a core, each with its files, without threads, and few texts a call."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parts = [(number, processes) for number in range(processes)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        seconds, cpu, tokens = zip(*pool.map(partial(_encode, folder, CALL_CHARACTERS), parts), strict=True)
    return max(seconds), sum(cpu), sum(tokens)


def _encode(folder: Path, characters: int, part: tuple[int, int]) -> Row:
    first, step = part
    tokenizer, seconds, cpu, tokens = Tokenizer.from_file(str(folder / "tokenizer.json")), 0.0, 0.0, 0
    for batch in texts(corpus_files(folder / "text")[first::step], characters):
        started, burnt = time.perf_counter(), time.process_time()
        tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
        seconds, cpu = seconds + time.perf_counter() - started, cpu + time.process_time() - burnt
    return seconds, cpu, tokens


def dryvine(folder: Path, processes: int) -> Row:
    started, burnt = time.perf_counter(), _cpu()
    spec = BuildSpec(tokenizer=folder / "tokenizer.json")
    made = build(match_files([f"{folder}/text/*.jsonl"]), spec, folder / "out", processes=processes)
    return time.perf_counter() - started, _cpu() - burnt, made.train.tokens + made.val.tokens


def _cpu() -> float:
    """Seconds of this process and of its children that have ended."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in each)


if __name__ == "__main__":
    row = {"threads": threads, "shares": shares, "dryvine": dryvine}[sys.argv[1]]
    print(json.dumps(row(Path(sys.argv[2]), int(sys.argv[3]))))
