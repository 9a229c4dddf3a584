"""How much a searched schedule saves over DualPipe at DualPipe's own memory, and how much any could: docs/schedules.md.

    python -m benchmarks.schedules.search [--steps 1000000] [--rounds 1] [--jobs 2] [--sizes 4x8,8x16]

Costs F = 1, I = 1.3, W = 0.8 with compute:communication 2:1 in F and I, pairs of any two ops priced on two resources; a
Markdown table, one row per (P, M). Deterministic for given steps and rounds, whatever the machine.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from dryvine.parallel.schedule.costs import Costs
from dryvine.parallel.schedule.notation import to_csv
from dryvine.parallel.schedule.search.search import Effort, Problem, in_one_measure, search
from dryvine.parallel.schedule.table import build

COSTS = Costs(F=1, I=1.3, W=0.8, comm=1 / 3)
SIZES = "4x8,4x16,8x16,8x32,16x32,16x64"


def row(pp: int, microbatches: int, steps: int, rounds: int, save: Path | None) -> str:
    begun = time.monotonic()
    base = in_one_measure(build("dualpipe", pp, microbatches), COSTS)
    found = search(Problem(pp, microbatches, COSTS, base.peak_activations), Effort(steps, rounds))
    if save:
        save.mkdir(parents=True, exist_ok=True)
        (save / f"search-{pp}x{microbatches}.csv").write_text(to_csv(found.timeline.schedule))
    span, seconds = found.timeline.span, time.monotonic() - begun
    goal = 0.10 if microbatches == 2 * pp else 0.05
    return (
        f"| {pp} | {microbatches} | {base.span:.2f} | {span:.2f} | {1 - span / base.span:.1%} | {goal:.0%} "
        f"| {found.bound:.2f} | {1 - found.bound / base.span:.1%} | {found.timeline.peak_activations} "
        f"| {base.overlapped_share:.0%} | {found.timeline.overlapped_share:.0%} | {seconds:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--save", type=Path, help="folder for the schedules found, as CSV")
    options = parser.parse_args()
    print("| P | M | DualPipe | found | saved | goal | bound | at most | held | overlapped: DualPipe | found | time |")
    print("|" + "---|" * 12)
    with ProcessPoolExecutor(options.jobs) as pool:
        sizes = [tuple(map(int, size.split("x"))) for size in options.sizes.split(",")]
        rows = [pool.submit(row, pp, m, options.steps, options.rounds, options.save) for pp, m in sizes]
        for each in rows:
            print(each.result(), flush=True)


if __name__ == "__main__":
    main()
