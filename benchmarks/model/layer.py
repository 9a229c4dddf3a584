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
the recipe has it. FP8 weights are quantised once a step, so not here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.support import kernel_times
from benchmarks.support.census import Census
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.pending import Pending
from dryvine.parallel.stage import Flight, Stage, State
from dryvine.parallel.wgrad import Closure
from dryvine.trainer.config import load
from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.choose import choose_engines
from dryvine.trainer.fp8.engines.torch import Torch
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.recipe import preset
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.model.spec import Spec

Recipe = Literal["bf16", "deepseek_v3"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
EP = 64
CONFIG = Path(__file__).parents[2] / "configs" / "deepseek_v3_671b.toml"
TOY = {"hidden": 128, "expert_ffn": 128, "heads": 2, "q_lora": 64, "kv_lora": 64, "nope_dim": 32, "rope_dim": 16,
       "v_dim": 32}  # fmt: skip


def v3(device: torch.device, recompute: bool) -> Shape:
    """V3's own MoE layer; on a CPU a narrow one, with as many experts."""
    shape = load(CONFIG).model
    changes = {"layers": 1, "first_dense": 0, "mtp_depth": 0} | (TOY if device.type == "cpu" else {})
    return Shape(**(shape.model_dump() | changes | ({} if recompute else {"recompute": ()})))


# ---- the layer, and a microbatch through it


class Mirror:
    """The `Exchange` of a group whose ranks all route as this one does: it receives what it sends."""

    def __init__(self, size: int) -> None:
        self.size, self.rank, self.meter = size, 0, Meter()

    def start(
        self,
        rows: torch.Tensor,
        sends: Sequence[int],
        receives: Sequence[int],
        into: torch.Tensor | None = None,
        what: str = "",
    ) -> Pending[torch.Tensor]:
        return Pending.done(rows.clone() if into is None else into.copy_(rows))


class Clock:
    """Marks on the device's own time: events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, before: Any, after: Any) -> float:
        """Milliseconds. On a GPU it waits for `after`."""
        if not self.cuda:
            return 1e3 * (after - before)
        after.synchronize()
        return before.elapsed_time(after)


@dataclass
class Spans:
    """Named stretches of one microbatch: "F attention", "B combine", "W experts", ..."""

    clock: Clock
    marks: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self.clock.mark()
        with record_function(name):
            yield
        self.marks[name] = before, self.clock.mark()

    def milliseconds(self) -> dict[str, float]:
        return {name: self.clock.between(*pair) for name, pair in self.marks.items()}

    def total(self) -> float:
        first, *_, last = self.marks.values()
        return self.clock.between(first[0], last[1])


@dataclass
class Bench:
    shape: Shape
    stage: Stage
    tokens: torch.Tensor  # [1, T + 1]: only their number counts, there is no embedding
    x: torch.Tensor
    dy: torch.Tensor
    engine: str

    def forward(self, spans: Spans) -> Flight:
        flight = Flight(self.tokens, 1.0)
        state: State = (self.x,)
        for phase in self.stage.phases:
            with spans(f"F {phase.name}"):
                state = phase.forward(state, flight).wait()
        return flight

    def saved_bytes(self) -> int:
        """Bytes that F leaves behind for B and W: the layer's input, and what its phases save."""
        with Census() as census:
            flight = self.forward(Spans(Clock(self.x.device)))
        held = census.bytes + self.x.nbytes
        del flight
        return held

    def microbatch(self, spans: Spans) -> None:
        flight = self.forward(spans)
        grads: tuple[Any, ...] = (self.dy,)
        later: dict[str, list[Closure]] = {}
        for phase in reversed(self.stage.phases):
            with spans(f"B {phase.name}"):
                result = phase.backward(grads, flight)
                grads, later[phase.name] = result.value.wait(), result.closures
                del result  # and with it what the step spent: there is one stream here
        for name, closures in later.items():
            if closures:
                with spans(f"W {name}"):
                    for closure in closures:
                        closure()
                    closures.clear()


@torch.no_grad()
def fill(model: Model, seed: int = 0) -> None:
    """`Model.initialise` on the device: drawing billions of numbers on a CPU takes half a minute."""
    torch.manual_seed(seed)
    for _, weight in model.named_parameters():
        weight.normal_(0, model.spec.shape.init_std) if weight.dim() > 1 else weight.fill_(1)
    for buffer in model.root.buffers():
        buffer.zero_()


def make_bench(recipe: Recipe, device: torch.device, tokens: int, recompute: bool, folder: Path) -> Bench:
    torch.manual_seed(0)
    shape = v3(device, recompute)
    fp8, engine = None, "products in BF16"
    if recipe != "bf16":
        alone = make_mesh(Layout(), device, timedelta(seconds=60))
        products, engine = choose_engines(preset(recipe), alone, folder)
        fp8 = FP8(preset(recipe), products, engine)
    dispatcher = Flat(Mirror(EP), shape.routed)
    model = Model(Spec(shape, torch.bfloat16, device, 0, EP, fp8), {0: ("layers.0",)}, dispatcher)
    fill(model)
    for _, weight in model.named_parameters():
        weight.gradient()
    x, dy = (torch.randn(tokens, shape.hidden, device=device).bfloat16() for _ in range(2))
    return Bench(shape, model.stages[0], torch.zeros(1, tokens + 1, dtype=torch.int64, device=device), x, dy, engine)


# ---- the least time it could take


def ceilings(device: torch.device) -> dict[str, float]:
    """FLOP/s that the device reaches on one large square product, by arithmetic."""
    n = 8192 if device.type == "cuda" else 256
    wide = torch.randn(2, n, n, device=device)
    a, b = wide.bfloat16()
    rates = {"fp32": _rate(n, device, lambda: wide[0] @ wide[1]), "bf16": _rate(n, device, lambda: a @ b)}
    if device.type == "cuda":
        from dryvine.trainer.fp8.kernels import hopper

        rows, blocks = casts.quantize_rows(a), casts.quantize_blocks(b)[0]
        engines = [hopper.product, *([] if Torch.missing(device) else [Torch().product])]
        rates["fp8"] = max(_rate(n, device, partial(engine, rows, blocks)) for engine in engines)
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


# ---- measuring


def measure(recipe: Recipe, options: argparse.Namespace, rates: dict[str, float], folder: Path) -> dict[str, Any]:
    """`folder` holds the engines' choice, and the trace unless one is asked for."""
    device = torch.device(options.device)
    bench = make_bench(recipe, device, options.tokens, not options.no_recompute, folder)
    for _ in range(3):  # kernels are compiled here
        bench.microbatch(Spans(Clock(device)))
    saved = bench.saved_bytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = []
    for _ in range(options.iterations):
        runs.append(Spans(Clock(device)))
        bench.microbatch(runs[-1])
    phases = [run.milliseconds() for run in runs]
    figures: dict[str, Any] = {
        "recipe": recipe,
        "engine": bench.engine,
        "total_ms": statistics.median(run.total() for run in runs),
        "phases_ms": {name: statistics.median(p[name] for p in phases) for name in phases[0]},
        "kept_bytes": saved,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }
    trace = _beside(options.trace or folder / "layer.json.gz", recipe)
    kernels = traced(bench, device, trace, phases[0])
    work = flops(bench.shape, options.tokens, options.tokens * bench.shape.top_k, recipe)
    best = {kind: 1e3 * count / rates.get(how, rates["bf16"]) for kind, (how, count) in work.items()}
    return figures | explained(kernels, figures["total_ms"], best)


def traced(bench: Bench, device: torch.device, path: Path, names: dict[str, float]) -> list[kernel_times.Kernel]:
    """The kernels of one microbatch, and its trace at `path`."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds):  # the profiler's own first use is slow
        bench.microbatch(Spans(Clock(device)))
    with profile(activities=kinds) as profiler:
        bench.microbatch(Spans(Clock(device)))
        if device.type == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return [kernel for kernel in kernel_times.read(path, names) if kernel.span]


def explained(kernels: list[kernel_times.Kernel], total_ms: float, best: dict[str, float]) -> dict[str, Any]:
    """Time by kind and phase, and the losses: how much longer each kind took than it must."""
    kinds = {kind: us / 1e3 for kind, us in kernel_times.by_kind(kernels).items()}
    kinds["gaps"] = max(0.0, total_ms - kernel_times.busy(kernels) / 1e3)
    losses = {kind: ms - best.get(kind, 0.0) for kind, ms in kinds.items()}
    spans = dict.fromkeys(kernel.span for kernel in kernels)
    parts = {span: kernel_times.by_kind(k for k in kernels if k.span == span) for span in spans}
    return {
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
    _table(
        console, "kinds, ms (share of the microbatch)", columns, [(one["kinds_ms"], one["total_ms"]) for one in results]
    )
    _table(console, "losses, ms: beyond the ideal of products and attention", columns,
           [(one["losses_ms"], one["total_ms"]) for one in results])  # fmt: skip
    for one in results:
        ideal = sum(one["ideal_ms"].values())
        console.print(
            f"{one['recipe']}: {one['total_ms']:.2f} ms a microbatch, ideal {ideal:.2f} ms "
            f"({ideal / one['total_ms']:.1%}); kept from F to B {one['kept_bytes'] / 1e9:.3f} GB, "
            f"peak {one['peak_bytes'] / 1e9:.2f} GB"
        )


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
