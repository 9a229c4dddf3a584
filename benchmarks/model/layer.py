"""One MoE layer of DeepSeek-V3 on one GPU: where a microbatch's time goes, phase by phase and kind by kind.

    python -m benchmarks.model.layer --device cuda [--recipe bf16|deepseek_v3] [--trace FILE.json.gz] [--json FILE]

The phases are those that the trainer runs (`Model`), one after the other on one stream, with W at the end, as a
schedule would have it. The rank is number 0 of a group of 64 that holds V3's 256 experts, and all others are taken to
route as it does: of 4096 tokens with 8 choices each, 32768 rows come to its 4 experts, as many to each as the gates
say. The dispatcher is `flat`, with all of its gathers and sums; only the transfer is replaced, by one copy on this
device.

The time of a phase is between CUDA events, host waits and launches included, without a profiler. Its kernels are read
from one more microbatch under torch.profiler. `gaps` are the events' total less the time in which any kernel ran.
`ideal` is the time of all products and the attention core at the rates that this chip reached on 8192^3, in FP8 where
the recipe has it. FP8 weights are quantised once a step, so not here. `MFU` is three times the forward's FLOPs, with
half the square of causal attention and without what is computed again, over the BF16 peak of an H100 or H200.

In a step ops are CUDA graphs where one rank or a node's ranks hold the experts, so on a GPU the same microbatch is
measured again as one graph: the columns "graph", whose `gaps` are what no launch by the host explains.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.support import kernel_times
from benchmarks.support.moe_layer import EP, RECIPES, Bench, Clock, Recipe, Spans, make_bench, untimed
from benchmarks.support.repeated import recorded
from dryvine.comm.live_steps import LiveSteps
from dryvine.parallel.graphs import CudaRecorder, Recorder
from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.engines.torch import Torch
from dryvine.trainer.model.shape import Shape, blocks

PEAK = 989.5e12  # FLOP/s in BF16, dense
REPLAY = "replay"


# ---- the least time it could take


def ceilings(device: torch.device) -> dict[str, float]:
    """FLOP/s that the device reaches on one large square product, by arithmetic."""
    n = 8192 if device.type == "cuda" else 256
    wide = torch.randn(2, n, n, device=device)
    a, b = wide.bfloat16()
    rates = {"fp32": _rate(n, device, lambda: wide[0] @ wide[1]), "bf16": _rate(n, device, lambda: a @ b)}
    if device.type == "cuda":
        from dryvine.trainer.fp8.kernels import hopper

        rows, tiles = casts.quantize_rows(a), casts.quantize_blocks(b)[0]
        engines = [hopper.product, *([] if Torch.missing(device) else [Torch().product])]
        rates["fp8"] = max(_rate(n, device, partial(engine, rows, tiles)) for engine in engines)
    return rates


def _rate(n: int, device: torch.device, run: Callable[[], object]) -> float:
    clock, times = Clock(device), []
    for _ in range(8):
        before = clock.mark()
        run()
        times.append(clock.between(before, clock.mark()))
    return 2e3 * n**3 / statistics.median(times[3:])


def flops(shape: Shape, tokens: int, rows: int, recipe: str) -> dict[str, tuple[str, float]]:
    """Kind -> (arithmetic, FLOPs) of forward, dgrad and wgrad. A causal core does half the square; its backward
    computes the scores again."""
    s, heads = shape, shape.heads
    assert s.q_lora is not None
    dense = s.hidden * (s.q_lora + s.kv_lora + s.rope_dim) + s.q_lora * heads * s.qk_dim
    dense += s.kv_lora * heads * (s.nope_dim + s.v_dim) + heads * s.v_dim * s.hidden
    expert = 3 * s.hidden * s.expert_ffn
    core = tokens * tokens * heads * ((s.qk_dim + s.v_dim) + (3 * s.qk_dim + 2 * s.v_dim))
    return {
        "GEMM": ("bf16" if recipe == "bf16" else "fp8", 6.0 * (tokens * (dense + s.shared * expert) + rows * expert)),
        "GEMM in FP32": ("fp32", 6.0 * tokens * s.hidden * s.routed),
        "attention core": ("bf16", float(core)),
    }


def model_flops(shape: Shape, tokens: int) -> float:
    """Three times the forward's, as MFU counts them: no recompute, half the square of attention."""
    return 3.0 * tokens * next(block.cost for block in blocks(shape, tokens) if block.kind == "moe")


# ---- measuring


def measure(recipe: Recipe, options: argparse.Namespace, rates: dict[str, float], folder: Path) -> dict[str, Any]:
    """`folder` holds the engines' choice, and the trace unless one is asked for."""
    device = torch.device(options.device)
    if device.type != "cuda":
        return _measure(recipe, options, rates, folder, None)
    recorder = CudaRecorder(device, LiveSteps())
    # All on the stream that records: a flight that is alive keeps the weights' nodes of autograd, each on the stream of
    # its first use, and a recorded backward must not wait for another.
    with torch.cuda.stream(recorder.stream):
        return _measure(recipe, options, rates, folder, recorder)


def _measure(
    recipe: Recipe, options: argparse.Namespace, rates: dict[str, float], folder: Path, recorder: Recorder | None
) -> dict[str, Any]:
    device = torch.device(options.device)
    bench = make_bench(recipe, device, options.tokens, not options.no_recompute, folder)
    for _ in range(3):  # kernels are compiled here
        bench.microbatch(untimed())
    saved = bench.saved_bytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = []
    for _ in range(options.iterations):
        runs.append(Spans(Clock(device)))
        bench.microbatch(runs[-1])
    phases = [run.milliseconds() for run in runs]
    total = statistics.median(run.total() for run in runs)
    figures: dict[str, Any] = {
        "recipe": recipe,
        "engine": bench.engine,
        "phases_ms": {name: statistics.median(p[name] for p in phases) for name in phases[0]},
        "kept_bytes": saved,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }
    work = flops(bench.shape, options.tokens, options.tokens * bench.shape.top_k, recipe)
    best = {kind: 1e3 * count / rates.get(how, rates["bf16"]) for kind, (how, count) in work.items()}
    needed = model_flops(bench.shape, options.tokens)
    trace = _beside(options.trace or folder / "layer.json.gz", recipe)
    figures |= explained(traced(lambda: bench.microbatch(untimed()), device, trace, phases[0]), total, best, needed)
    if recorder is not None and not bench.reads_counts:
        figures["graph"] = as_graph(bench, recorder, options.iterations, _beside(trace, "graph"), best, needed)
    return figures


def as_graph(
    bench: Bench, recorder: Recorder, iterations: int, trace: Path, best: dict[str, float], needed: float
) -> dict[str, Any]:
    """The microbatch as one CUDA graph: its figures, and how far its gradients are from those without."""
    device, again = bench.x.device, bench.again()
    for _ in range(2):  # more kernels: those that read counts on the device
        again.microbatch(untimed())
    replay = recorded(lambda: again.microbatch(untimed()), recorder)

    def play(spans: Spans) -> None:
        with spans(REPLAY):
            replay()

    replays = [Spans(Clock(device)) for _ in range(3 + iterations)]
    for each in replays:
        play(each)
    total = statistics.median(each.total() for each in replays[3:])
    figures = explained(traced(lambda: play(untimed()), device, trace, [REPLAY]), total, best, needed)
    return figures | {"gradients_off": bench.difference(replay)}


def traced(
    run: Callable[[], None], device: torch.device, path: Path, names: Iterable[str]
) -> list[kernel_times.Kernel]:
    """The kernels of one run that these spans launched, and its trace at `path`."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds):  # the profiler's own first use is slow
        run()
    with profile(activities=kinds) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return [kernel for kernel in kernel_times.read(path, names) if kernel.span]


def explained(
    kernels: list[kernel_times.Kernel], total_ms: float, best: dict[str, float], needed: float
) -> dict[str, Any]:
    """Time by kind and phase, and the losses: how much longer each kind took than it must. `needed` FLOPs for MFU."""
    kinds = {kind: us / 1e3 for kind, us in kernel_times.by_kind(kernels).items()}
    kinds["gaps"] = max(0.0, total_ms - kernel_times.busy(kernels) / 1e3)
    losses = {kind: ms - best.get(kind, 0.0) for kind, ms in kinds.items()}
    spans = dict.fromkeys(kernel.span for kernel in kernels)
    parts = {span: kernel_times.by_kind(k for k in kernels if k.span == span) for span in spans}
    return {
        "total_ms": total_ms,
        "mfu": 1e3 * needed / total_ms / PEAK,
        "kinds_ms": kinds,
        "ideal_ms": best,
        "losses_ms": dict(sorted(losses.items(), key=lambda item: -item[1])),
        "kinds_by_phase_ms": {span: {kind: us / 1e3 for kind, us in part.items()} for span, part in parts.items()},
        "largest": kernel_times.largest(kernels),
        "unclassified": kernel_times.largest([k for k in kernels if k.kind == kernel_times.UNKNOWN], 100),
    }


# ---- output


def show(console: Console, results: list[dict[str, Any]]) -> None:
    for one in results:
        console.print(f"\n{one['recipe']}: {one['engine']}")
        for name, kind, count, us in one["largest"]:
            console.print(f"  {us / 1e3:8.3f} ms {count:4d} x  {kind:16} {name}", markup=False, highlight=False)
        for name, _, count, us in one["unclassified"]:
            console.print(f"  unclassified {us / 1e3:8.3f} ms {count:4d} x {name}", markup=False, highlight=False)
    columns = [one["recipe"] for one in results]
    _table(console, "phases, ms", columns, [(one["phases_ms"], one["total_ms"]) for one in results])
    every = {name: part for one in results for name, part in _with_graph(one).items()}
    for title, figures in (
        ("kinds, ms (share of the microbatch)", "kinds_ms"),
        ("losses, ms: beyond the ideal of products and attention", "losses_ms"),
    ):
        _table(console, title, list(every), [(part[figures], part["total_ms"]) for part in every.values()])
    for one in results:
        console.print(
            f"{one['recipe']}: kept from F to B {one['kept_bytes'] / 1e9:.3f} GB, peak {one['peak_bytes'] / 1e9:.2f} GB"
        )
    for name, part in every.items():
        console.print(f"{name}: {_line(part)}")


def _with_graph(one: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The microbatch, and the same as a graph where it was one, by name."""
    return {one["recipe"]: one} | ({f"{one['recipe']}, graph": one["graph"]} if "graph" in one else {})


def _line(part: dict[str, Any]) -> str:
    ideal, total = sum(part["ideal_ms"].values()), part["total_ms"]
    line = f"{total:.2f} ms a microbatch, ideal {ideal:.2f} ms ({ideal / total:.1%}), {part['mfu']:.1%} MFU"
    line += f", gaps {part['kinds_ms']['gaps']:.2f} ms"
    off = part.get("gradients_off")
    return line if off is None else f"{line}; gradients off by {off:.1e} of their norm"


def _table(console: Console, title: str, columns: list[str], each: list[tuple[dict[str, float], float]]) -> None:
    table = Table("", *columns, title=title)
    for name in dict.fromkeys(name for figures, _ in each for name in figures):
        cells = (f"{f[name]:.3f} ({f[name] / total:.1%})" if name in f else "-" for f, total in each)
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="on a CPU a toy, to see that it runs")
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="default: both")
    parser.add_argument("--tokens", type=int, help="of the one sequence; 4096, or 64 on a CPU")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--no-recompute", action="store_true", help="keep what the config recomputes")
    parser.add_argument("--trace", type=Path, help="NAME.json.gz for Perfetto; the recipe joins its name")
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args()
    device = torch.device(options.device)
    options.tokens = options.tokens or (4096 if device.type == "cuda" else 64)
    console = Console(width=140)
    named = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    console.print(f"{named}, torch {torch.__version__}; {options.tokens} tokens, EP{EP} on one rank")
    rates = ceilings(device)
    console.print("ceilings, TFLOPS: " + ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in rates.items()))
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(recipe, options, rates, Path(folder)) for recipe in options.recipe or RECIPES]
    show(console, results)
    if options.json:
        options.json.write_text(json.dumps({"device": named, "ceilings": rates, "layers": results}, indent=1))


def _beside(base: Path, recipe: str) -> Path:
    return base.with_name(f"{base.name.removesuffix('.json.gz')}-{recipe}.json.gz")


if __name__ == "__main__":
    main()
