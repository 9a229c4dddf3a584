"""What a reward costs: answers a second through the pool, beside the verifier called in this process without one.

    python -m benchmarks.verifiers [--workers N] [--scale 1.0]

The second column is the limit: no deadline, no limits, and no answer that hangs. Programs and reasoning-gym have none,
since nobody should run them so.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import time
from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from dryvine.trainer.rl.verifiers.names import VERIFIERS
from dryvine.trainer.rl.verifiers.pool import Pool
from dryvine.trainer.rl.verifiers.verdict import Job

TAGGED = "<think>3*7=21</think><answer>{}</answer>"


class Load(NamedTuple):
    """Answers (N is a number, so that nothing is remembered), how many, and whether they may do without the pool."""

    answer: str
    problem: Mapping[str, object]
    count: int
    alone: bool


LOADS = {
    "format": Load(TAGGED.format("5"), {}, 4000, True),
    "countdown": Load(TAGGED.format("3*7+5"), {"numbers": [3, 5, 7], "target": 26}, 4000, True),
    "math": Load(TAGGED.format(r"\frac{N}{4}"), {"answer": "2.5"}, 200, True),
    "code": Load("```\nprint(int(input()) ** 2)\n```", {"tests": [{"stdin": "3", "stdout": "9"}]}, 40, False),
    "reasoning_gym": Load(
        TAGGED.format("x"), {"dataset": "chain_sum", "options": {}, "seed": 1, "size": 5, "index": 0}, 100, False
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of answers")
    words = parser.parse_args()
    table = Table("verifier", "answers/s, pool", "in this process", "ms an answer and worker")
    for name, load in LOADS.items():
        count = max(words.workers, int(load.count * words.scale))
        pooled, alone = _pooled(name, load, count, words.workers), _alone(name, load, count) if load.alone else None
        beside = f"{alone:,.0f}" if alone else "-"
        table.add_row(name, f"{pooled:,.0f}", beside, f"{1e3 * words.workers / pooled:.2f}")
    console = Console()
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, {words.workers} workers")
    console.print(table)


def _pooled(name: str, load: Load, count: int, workers: int) -> float:
    with Pool([name], workers) as pool:
        pool.score(_jobs(name, load, 2 * workers))  # a first answer loads what is lazy
        jobs = _jobs(name, load, count)
        began = time.perf_counter()
        pool.score(jobs)
        return count / (time.perf_counter() - began)


def _jobs(name: str, load: Load, count: int) -> list[Job]:
    return [Job(name, load.answer.replace("N", str(number)), load.problem) for number in range(count)]


def _alone(name: str, load: Load, count: int) -> float:
    verify = importlib.import_module(VERIFIERS[name]).verify
    verify(load.answer, load.problem)
    jobs = _jobs(name, load, count)
    began = time.perf_counter()
    for job in jobs:
        verify(job.answer, job.problem)
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
