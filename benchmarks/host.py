"""Who limits a step, the device or the host that feeds it: with CUDA graphs and without.

    python -m benchmarks.host [--set KEY=VALUE ...] [--even] [--ways on off] [--deadline SECONDS] [--json FILE]

The model of two_gpus.toml on one GPU, 8 microbatches of 4096 tokens, in BF16 and in FP8, each with graphs off and on in
a process of its own; with `--set parallel.ep=2 comm.dispatcher=nvlink parallel.schedule=dualpipev` on two GPUs, as many
microbatches on each. Device busy is the union of all kernels' times over the length of a profiled step, NCCL's left
out, which wait; exposed is time in which compute waited for the all-to-all; launches are
calls that start kernels, copies or graphs; reads are the places in a step where torch makes the host wait for the
device. Memory of graphs is the peak with them less the peak without. An untrained gate loads expert-parallel ranks
unevenly, more with each step, and the others wait: `imbalance` is the busiest rank's load over the mean in the last
step, and `--even` gives every expert equal load, for times of everything but that. Losses and weights after the last
step are compared with those without graphs, which run twice, since a kernel of a library may add in another order each
time. JSON is written after each run, so that what there was time for is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.support.corpus import corpus
from dryvine.comm import local
from dryvine.trainer.activations import flight_sizes, held_bytes
from dryvine.trainer.config import load
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.graph_memory import graph_bytes
from dryvine.trainer.ramps import Point
from dryvine.trainer.rehearse import rehearse
from dryvine.trainer.rig import Rig, make_rig, mesh_of
from dryvine.trainer.run_plan import RunPlan, make_plan
from dryvine.trainer.step import StepOutcome, train_step
from tests.support.live import evenly

CONFIG = Path(__file__).parent / "two_gpus.toml"
SEQUENCES, WARM, STEPS = 8, 3, 7
NUMERICS = {"BF16": (), "FP8": ("fp8.preset=deepseek_v3", "fp8.guard_every=0")}
NO_WORK = ("Optimizer", "nccl")
LAUNCHES = ("Launch", "Memcpy", "Memset")


@dataclass(frozen=True)
class Measured:
    milliseconds: float  # of a step, median
    tokens_per_second: float
    exposed: float  # milliseconds of a step, median
    busy: float  # share of a profiled step in which a kernel runs
    kernels: int
    launches: int
    reads: int  # of the device by the host, in a step
    graphs: int
    peak: int  # bytes reserved
    allocated: int  # of them at the peak, without the allocator's holes
    imbalance: float
    loss: float  # of the last microbatch
    predicted: int  # bytes that graphs were said to hold
    bits: str  # of losses and weights
    by_kind: dict[str, float]  # milliseconds of kernels by name, the longest
    card: str


def measure(rank: int, plan: RunPlan, even: bool) -> Measured:
    """On this process's GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    rig = make_rig(plan, mesh_of(plan, device), open_data(plan.config))
    for gate in rig.model.gates.values() if even else ():
        gate.choose = evenly(gate)  # type: ignore[method-assign]
    rehearse(rig)
    torch.cuda.reset_peak_memory_stats()
    seconds, losses, exposed = [], [], []
    for step in range(WARM + STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        outcome = _step(rig, step)
        losses += [float(loss) for many in outcome.played.losses.values() for loss in many]
        exposed.append(outcome.played.exposed)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    bits = hashlib.sha256(repr(losses).encode())
    for _, weight in sorted(rig.model.named_parameters()):
        bits.update(weight.detach().cpu().view(torch.uint8).numpy().tobytes())
    peak, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    middle = median(seconds[WARM:])
    reads = _reads(rig, WARM + STEPS)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        _step(rig, WARM + STEPS + 1)
        torch.cuda.synchronize()
    # What is called "gpu_user_annotation" spans kernels and is none.
    events = [e for e in profiled.events() if e.device_type == DeviceType.CUDA and not e.name.startswith(NO_WORK)]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    calls = Counter(e.name for e in profiled.events() if e.device_type == DeviceType.CPU)
    kinds: Counter[str] = Counter()
    for event in events:
        kinds[event.name[:60]] += event.time_range.elapsed_us() / 1e3
    return Measured(
        milliseconds=1e3 * middle,
        tokens_per_second=_sequences(plan) * plan.config.data.seq_len / middle,
        exposed=1e3 * median(exposed[WARM:]),
        busy=_union(spans) / (spans[-1][1] - spans[0][0]),
        kernels=len(events),
        launches=sum(n for name, n in calls.items() if name.startswith("cu") and any(w in name for w in LAUNCHES)),
        reads=reads,
        graphs=rig.graphs.count if rig.graphs else 0,
        peak=peak,
        allocated=allocated,
        imbalance=1.0 if even else outcome.balance.ranks,
        loss=losses[-1],
        predicted=max(graph_bytes(plan, flight_sizes(plan, cuda=True), held_bytes(plan, cuda=True), cuda=True)),
        bits=bits.hexdigest()[:12],
        by_kind=dict(kinds.most_common(25)),
        card=torch.cuda.get_device_name(),
    )


def _sequences(plan: RunPlan) -> int:
    """In a step of all ranks."""
    return SEQUENCES * plan.config.parallel.ep


def _step(rig: Rig, number: int) -> StepOutcome:
    sequences = _sequences(rig.plan)
    return train_step(rig, Point(number, number * sequences, sequences, rig.config.data.seq_len))


def _reads(rig: Rig, number: int) -> int:
    """Warnings of torch in the schedule of a step."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        _step(rig, number)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in seen)


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Time that is covered by intervals in order of their starts."""
    covered, until = 0.0, 0.0
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--set", nargs="*", default=[], help="more of the config, as table.key=value")
    options.add_argument("--deadline", type=float, default=120.0, help="seconds for each process")
    options.add_argument("--json", type=Path)
    options.add_argument("--even", action="store_true", help="every expert gets as many rows as any other")
    options.add_argument("--ways", nargs="*", default=["on", "off", "off again"], help="graphs, in this order")
    options.add_argument("--numerics", nargs="*", default=list(NUMERICS), choices=list(NUMERICS))
    given = options.parse_args()
    table = Table(
        "", "graphs", "ms", "tokens/s", "exposed", "busy", "kernels", "launches", "reads", "GB", "of it used",
        "graphs'", "imbalance", "loss", "bits",
    )  # fmt: skip
    made: dict[str, Measured] = {}
    local.preload(__name__)
    with tempfile.TemporaryDirectory() as folder:
        sequences = SEQUENCES * load(CONFIG, tuple(given.set)).parallel.ep
        # All steps alike: no ramp.
        batch = (f"batch.sequences={sequences}", f"batch.ramp_from={sequences}")
        data = f'data.source="{corpus(Path(folder), 320)}"'
        # With graphs first: what users get, if not all can be had in time.
        for way in given.ways:
            for numerics in given.numerics:
                graphs = f"parallel.graphs={way.split()[0]}"
                words = ("parallel.pp=1", "parallel.schedule=one_f_one_b", graphs, data, *batch)
                plan = make_plan(load(CONFIG, (*words, *NUMERICS[numerics], *given.set)))
                found, *others = local.run(
                    measure, plan.config.parallel.world, plan, given.even, deadline=given.deadline, device="cuda"
                )
                found = replace(found, bits=" ".join(each.bits for each in (found, *others)))
                made[f"{numerics} {way}"] = found
                table.add_row(
                    f"{numerics} {way}", f"{found.graphs}", f"{found.milliseconds:.0f}",
                    f"{found.tokens_per_second:,.0f}", f"{found.exposed:.1f}", f"{found.busy:.1%}", f"{found.kernels}",
                    f"{found.launches}", f"{found.reads}", f"{found.peak / 1e9:.1f}",
                    f"{found.allocated / 1e9:.1f}", f"{found.predicted / 1e9:.1f}", f"{found.imbalance:.2f}",
                    f"{found.loss:.3f}", found.bits,
                )  # fmt: skip
                print(f"{numerics} {way}: {found.milliseconds:.0f} ms, busy {found.busy:.1%}", flush=True)
                if given.json:
                    given.json.write_text(json.dumps({name: asdict(one) for name, one in made.items()}, indent=1))
    Console(width=150).print(table)
    different = [
        f"{numerics}: {way} and {given.ways[0]} have different bits"
        for numerics in given.numerics
        for way in given.ways[1:]
        if made[f"{numerics} {given.ways[0]}"].bits != made[f"{numerics} {way}"].bits
    ]
    print("\n".join(different))
    return any(
        graphs_change_bits({way: made[f"{numerics} {way}"].bits for way in given.ways}) for numerics in given.numerics
    )


def graphs_change_bits(bits: dict[str, str]) -> bool:
    """Whether two runs without graphs have the same bits, and one with them others."""
    without = [of for way, of in bits.items() if way.startswith("off")]
    return len(without) > 1 and len(set(without)) == 1 and bits.get("on", without[0]) != without[0]


if __name__ == "__main__":
    sys.exit(main())
