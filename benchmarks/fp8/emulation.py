"""What emulated FP8 costs on a CPU: a training step of a small model in FP8 over the same step in BF16 and FP32.

    OMP_NUM_THREADS=2 python -m benchmarks.fp8.emulation [--config configs/tiny_cpu.toml] [--steps 5] [--profile]

One process holds the whole model. The precisions take turns, a step each, so that a machine that slows down slows all
of them; printed are medians of CPU seconds (of all threads, which neighbours change less than the clock's) and of the
clock's, and ratios of the former. --profile prints the operators that the FP8 step spends its time in.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import islice

import torch
from torch.profiler import ProfilerActivity, profile

from dryvine.parallel.config import ParallelConfig
from dryvine.trainer.config import Config, load
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.ramps import Point, points
from dryvine.trainer.rig import make_rig, mesh_of
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.step import train_step

KINDS = {
    "fp32": ('run.dtype="fp32"',),
    "bf16": ('run.dtype="bf16"',),
    "fp8": ('run.dtype="bf16"', 'fp8.preset="deepseek_v3"'),
    "fp8, 14-bit sums": ('run.dtype="bf16"', 'fp8.preset="deepseek_v3"', 'fp8.accumulator="hopper"'),
}


def stepper(config: Config) -> Callable[[Point], tuple[float, float]]:
    """Takes a step in one process -> its seconds, of the CPU and of the clock."""
    one = config.model_copy(
        update={"parallel": ParallelConfig(microbatch_sequences=config.parallel.microbatch_sequences)}
    )
    plan = make_plan(one)
    rig = make_rig(plan, mesh_of(plan, torch.device("cpu")), open_data(one))

    def step(point: Point) -> tuple[float, float]:
        started = time.process_time(), time.perf_counter()
        train_step(rig, point)
        return time.process_time() - started[0], time.perf_counter() - started[1]

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny_cpu.toml")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    configs = {kind: load(given.config, ('run.device="cpu"', *words)) for kind, words in KINDS.items()}
    steppers = {kind: stepper(config) for kind, config in configs.items()}
    first = next(iter(configs.values()))
    where = list(islice(points(first.batch, first.data.seq_len), given.steps + 1))
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for point in where:
        for kind, step in steppers.items():
            taken[kind].append(step(point))
    cpu, clock = (
        {kind: statistics.median(pair[i] for pair in pairs[1:]) for kind, pairs in taken.items()} for i in range(2)
    )
    tokens = first.batch.sequences * first.data.seq_len
    print(f"{given.config}, {tokens} tokens a step, {torch.get_num_threads()} threads; seconds of CPU and clock")
    for kind, s in cpu.items():
        print(f"  {kind:<18} {s:6.2f} {clock[kind]:6.2f}   {s / cpu['bf16']:.2f} x bf16   {s / cpu['fp32']:.2f} x fp32")
    if given.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            steppers["fp8"](where[-1])
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


if __name__ == "__main__":
    main()
