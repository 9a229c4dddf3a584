"""Full training steps, beside those of transformers' DeepseekV3 on the same card in the same run.

    python -m benchmarks.model.peer --device cuda [--deadline SECONDS] [--json FILE] [--contender NAME ...]
    OMP_NUM_THREADS=1 python -m benchmarks.model.peer --size laptop

One V3-shaped model of 3 billion parameters (hidden 2048, 10 layers, 64 experts, 8 a token), BF16 weights, sequences of
4096 random tokens that all contenders share, the same microbatches and tokens a step: forward, backward, clip by the
global norm, AdamW. `laptop` is tiny_cpu's model of 2.5 million without MTP, sequences of 256, in FP32; a CPU's steps
are counted in the seconds that its cores worked for them, so that other processes do not count. Each contender trains
as it does by default, which is not the same work:

    transformers   BF16 weights, BF16 gradients, BF16 moments (torch's fused AdamW on a BF16 model); sdpa
    dryvine        BF16 weights, FP32 gradient sums and masters, moments in FP32, or with `--moments bf16` in BF16 as
                   V3 has them; the trainer's own `train_step`

A contender runs in a process of its own with a deadline; one that fails is listed with its reason. That both are the
same model is proven in tests/trainer/test_model_parity.py; here their parameters are counted. MFU is 3 x the forward's
FLOPs (products, and half the square for causal attention; nothing for what is recomputed) over 989 TFLOPS, the BF16
peak of an H100 or H200, for FP8 too. `batched_mm` experts are left out: they copy a weight for every row, terabytes
here. On a GPU a last step is profiled: device time by kind, kernels on two streams at once counted twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.support import kernel_times
from benchmarks.support.moe_layer import fill
from dryvine.trainer.config import Config
from dryvine.trainer.data.splits import Data
from dryvine.trainer.hand_off.hf_config import config_json
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Shape, blocks, count_parameters
from dryvine.trainer.ramps import points
from dryvine.trainer.rehearse import rehearse
from dryvine.trainer.rig import make_rig, mesh_of
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.step import train_step

PEAK = 989e12
COMMON: dict[str, Any] = {
    "score": "sigmoid", "normalise": True, "route_scale": 2.5, "shared": 1, "init_std": 0.02, "balance_alpha": 0.0,
}  # fmt: skip
LARGE = Shape(
    layers=10, first_dense=1, hidden=2048, ffn=5120, expert_ffn=768, heads=16, q_lora=768, kv_lora=512, nope_dim=128,
    rope_dim=64, v_dim=128, routed=64, top_k=8, groups=8, group_limit=4, vocab=32768, max_position=4096, **COMMON,
)  # fmt: skip
LAPTOP = Shape(
    layers=4, first_dense=1, hidden=128, ffn=384, expert_ffn=96, heads=4, q_lora=64, kv_lora=64, nope_dim=32,
    rope_dim=16, v_dim=32, routed=8, top_k=2, groups=4, group_limit=2, vocab=4096, max_position=256, **COMMON,
)  # fmt: skip
SMALL = Shape(
    layers=2, first_dense=1, hidden=64, ffn=128, expert_ffn=128, heads=2, q_lora=32, kv_lora=32, nope_dim=16,
    rope_dim=8, v_dim=16, routed=8, top_k=2, groups=2, group_limit=1, vocab=320, max_position=64, **COMMON,
)  # fmt: skip


class Size(NamedTuple):
    shape: Shape
    sequences: int  # of a microbatch
    microbatches: int  # of a step
    dtype: str


SIZES = {
    "3b": Size(LARGE, 4, 2, "bf16"),
    "laptop": Size(LAPTOP, 4, 4, "fp32"),
    "toy": Size(SMALL, 2, 2, "bf16"),
}


class Work(NamedTuple):
    """What every contender trains, and for how long."""

    shape: Shape
    sequences: int  # of a microbatch
    microbatches: int  # of a step
    dtype: str  # of weights, "bf16" or "fp32"
    moments: str  # of dryvine's AdamW, "bf16" or "fp32"
    device: torch.device
    warm: int  # steps before those measured
    steps: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.microbatches * self.shape.max_position

    @property
    def flops(self) -> float:
        """Of one step: 3 x the forward's."""
        return 3.0 * self.tokens * sum(block.cost for block in blocks(self.shape, self.shape.max_position))


class RandomTokens:
    """A TokenSource without a corpus: sequence n is drawn from seed n, so it is the same for all."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def sequences(self, first: int, count: int) -> NDArray[np.int64]:
        size = self.shape.max_position + 1
        return np.stack(
            [np.random.default_rng(n).integers(self.shape.vocab, size=size) for n in range(first, first + count)]
        )


# ---- contenders: each returns a step (its number -> loss), the parameters it trains, and what the optimizer keeps


class Ready(NamedTuple):
    step: Callable[[int], float]
    parameters: int
    states: str
    note: str = ""


def dryvine(work: Work, recipe: str = "bf16") -> Ready:
    # A run's folder keeps which engines `auto` chose.
    shape, folder = work.shape, tempfile.mkdtemp()
    config = Config.model_validate({
        "run": {"name": "peer", "steps": 1, "dtype": work.dtype, "device": work.device.type, "out": folder},
        "model": shape,
        "data": {"source": "random", "seq_len": shape.max_position, "vocab_size": shape.vocab},
        "batch": {"sequences": work.sequences * work.microbatches},
        "parallel": {"pp": 1, "ep": 1, "schedule": "one_f_one_b", "microbatch_sequences": work.sequences},
        "optim": {"lr": 1e-4, "moments": work.moments, "plan": [{"shape": "constant", "length": 1, "to": 1.0}]},
        "fp8": {"preset": recipe, "guard_every": 0},
    })  # fmt: skip
    source: Any = RandomTokens(shape)
    plan = make_plan(config)
    with patch.object(Model, "initialise", fill):
        rig = make_rig(plan, mesh_of(plan, work.device), Data(source, source))
    rehearse(rig)
    each = points(config.batch, shape.max_position)

    def step(number: int) -> float:
        result = train_step(rig, next(each))
        return float(torch.stack(result.played.losses["loss"]).mean())

    parameters = sum(weight.numel() for _, weight in rig.model.named_parameters())
    states = f"FP32 gradients and masters, {work.moments.upper()} moments"
    return Ready(step, parameters, states, rig.fp8.chosen if rig.fp8 else "")


def transformers(work: Work, experts: str, compiled: bool = False) -> Ready:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if work.dtype == "bf16" else torch.float32)
    config = DeepseekV3Config(**config_json(work.shape), use_cache=False)
    with torch.device(work.device):
        settings = {"attn_implementation": "sdpa", "experts_implementation": experts}
        model: Any = DeepseekV3ForCausalLM._from_config(config, **settings)
    used = {name: getattr(model.config, f"_{name}") for name in settings}
    assert used == settings, f"transformers uses {used}"
    torch.set_default_dtype(torch.float32)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = torch.compile(model.train()) if compiled else model.train()
    source = RandomTokens(work.shape)

    def step(number: int) -> float:
        losses = []
        for m in range(work.microbatches):
            first = (number * work.microbatches + m) * work.sequences
            tokens = torch.from_numpy(source.sequences(first, work.sequences)[:, :-1]).to(work.device)
            loss = run(input_ids=tokens, labels=tokens).loss / work.microbatches
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return float(torch.stack(losses).sum())

    return Ready(
        step, parameters, f"{work.dtype.upper()} gradients and moments", f"transformers {_version('transformers')}"
    )


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


CONTENDERS: dict[str, tuple[float, Callable[[Work], Ready]]] = {  # name -> seconds allowed, maker
    "dryvine": (70, dryvine),
    "dryvine fp8": (80, lambda work: dryvine(work, "deepseek_v3")),
    "transformers grouped_mm": (60, lambda work: transformers(work, "grouped_mm")),
    "transformers eager": (60, lambda work: transformers(work, "eager")),
    "transformers grouped_mm compiled": (150, lambda work: transformers(work, "grouped_mm", compiled=True)),
}


def _able(size: str) -> Iterator[str]:
    """Contenders of a size: compiling takes longer than all of a small one, and FP8 is over BF16 weights."""
    for name in CONTENDERS:
        if size == "3b" or not ("compiled" in name or ("fp8" in name and SIZES[size].dtype == "fp32")):
            yield name


# ---- measuring


def measure(name: str, work: Work) -> dict[str, Any]:
    """Seconds of each of `steps` steps after `warm` of them. Every step ends in reading its loss, so the host waits."""
    warnings.filterwarnings("ignore")
    clock = time.perf_counter if work.device.type == "cuda" else time.process_time
    started = time.perf_counter()
    ready = CONTENDERS[name][1](work)
    losses, times = [], []
    for number in range(work.warm + work.steps):
        before = clock()
        losses.append(ready.step(number))
        times.append(clock() - before)
        print(f"  {name}: step {number}, loss {losses[-1]:.3f}, {times[-1]:.2f} s", file=sys.stderr, flush=True)
        if number == work.warm - 1 and work.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(times[work.warm :])
    peak = torch.cuda.max_memory_allocated() if work.device.type == "cuda" else 0
    return {
        "tokens_per_second": work.tokens / seconds,
        "mfu": work.flops / seconds / PEAK,
        "peak_bytes": peak,
        **(device_time(lambda: ready.step(work.warm + work.steps)) if work.device.type == "cuda" else {}),
        "steps_s": times,
        "losses": losses,
        "parameters": ready.parameters,
        "states": ready.states,
        "note": ready.note,
        "whole_s": time.perf_counter() - started,
    }


def device_time(step: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds of a profiled step's kernels by kind, "gaps" when none runs; and the longest kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(str(trace := Path(folder) / "trace.json"))
        kernels = kernel_times.read(trace, ())
    kinds = {kind: us / 1e3 for kind, us in kernel_times.by_kind(kernels).items()}
    length = max(k.start + k.duration for k in kernels) - kernels[0].start
    kinds["gaps"] = (length - kernel_times.busy(kernels)) / 1e3
    return {"kinds_ms": kinds, "kernels": len(kernels), "largest": kernel_times.largest(kernels, 40)}


def attempt(name: str, seconds: float, words: list[str]) -> dict[str, Any]:
    """`measure` in a process of its own; of a failure, the line with the error."""
    command = [sys.executable, "-m", __spec__.name, *words, "--contender", name, "--one"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as late:
        stderr = late.stderr.decode() if isinstance(late.stderr, bytes) else late.stderr or ""
        return {"failed": f"not done in {seconds:.0f} s; last: {_last(stderr)}"}
    if done.returncode:
        return {"failed": _error(done.stderr)}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no output"


def _error(text: str) -> str:
    """The line of an exception, not what a library printed after it."""
    named = [line for line in text.splitlines() if "Error" in line.split(":")[0] or "out of memory" in line]
    return (named[-1].strip() if named else _last(text))[:300]


def show(console: Console, results: dict[str, dict[str, Any]], work: Work) -> bool:
    """Print the table; returns whether all have as many parameters as the shape says."""
    good = {name: one for name, one in results.items() if "failed" not in one}
    theirs = max((one["tokens_per_second"] for name, one in good.items() if name.startswith("trans")), default=None)
    table = Table("", "tokens/s", "against their best", "MFU", "peak GB", "first, last loss", "optimizer keeps")
    for name, one in good.items():
        ratio = f"{one['tokens_per_second'] / theirs:.2f}x" if theirs else "-"
        mfu = f"{one['mfu']:.1%}" if work.device.type == "cuda" else "-"
        losses = f"{one['losses'][0]:.3f}, {one['losses'][-1]:.3f}"
        speed, peak = f"{one['tokens_per_second']:,.0f}", f"{one['peak_bytes'] / 1e9:.1f}"
        table.add_row(name, speed, ratio, mfu, peak, losses, one["states"])
    console.print(table)
    if timed := {name: one["kinds_ms"] for name, one in good.items() if "kinds_ms" in one}:
        console.print(_kinds(timed))
    for name, one in results.items():
        if note := one.get("failed") or one.get("note"):
            console.print(f"{name}: {note}", markup=False, highlight=False)
    counts = {name: one["parameters"] for name, one in good.items()}
    expected = count_parameters(work.shape)[0]
    same = set(counts.values()) <= {expected}
    console.print(f"parameters: {expected:,} each" if same else f"PARAMETERS DIFFER from {expected:,}: {counts}")
    return same and bool(good)


def _kinds(timed: dict[str, dict[str, float]]) -> Table:
    """A column for each contender, a row for each kind that any of them has."""
    table = Table("ms of one step on the device", *timed)
    for kind in dict.fromkeys(kind for kinds in timed.values() for kind in kinds):
        table.add_row(kind, *(f"{kinds.get(kind, 0.0):.1f}" for kinds in timed.values()))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=list(SIZES), default="3b", help="toy: seconds on a CPU")
    parser.add_argument("--contender", action="append", choices=list(CONTENDERS), help="3b: all; else all but compiled")
    parser.add_argument("--sequences", type=int, help="of a microbatch")
    parser.add_argument("--microbatches", type=int, help="of a step")
    parser.add_argument("--moments", choices=("fp32", "bf16"), default="fp32", help="of dryvine's AdamW")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, default=6, help="measured, after 3 that are not")
    parser.add_argument("--deadline", type=float, default=235, help="seconds for all together")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SIZES[options.size]
    shape = size.shape.model_copy(update={"layers": options.layers}) if options.layers else size.shape
    work = Work(
        shape,
        options.sequences or size.sequences,
        options.microbatches or size.microbatches,
        size.dtype,
        options.moments,
        torch.device(options.device),
        3,
        options.steps,
    )
    names = options.contender or list(_able(options.size))
    if options.one:
        print(json.dumps(measure(names[0], work)))
        return 0
    console = Console(width=160)
    named = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    total, active = count_parameters(shape)
    console.print(
        f"{named}, torch {torch.__version__}; {total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active; "
        f"{work.tokens} tokens a step in {work.microbatches} microbatches; {work.flops / 1e12:.1f} TFLOP a step"
    )
    words = [f"--device={options.device}", f"--sequences={work.sequences}", f"--microbatches={work.microbatches}",
             f"--layers={shape.layers}", f"--steps={work.steps}", f"--size={options.size}",
             f"--moments={work.moments}"]  # fmt: skip
    results, end = {}, time.monotonic() + options.deadline
    for name in names:
        left = end - time.monotonic()
        results[name] = attempt(name, min(CONTENDERS[name][0], left), words) if left > 5 else {"failed": "no time left"}
        console.print(f"{name}: {results[name].get('failed') or 'done'}", markup=False, highlight=False)
    good = show(console, results, work)
    if options.json:
        options.json.write_text(json.dumps({"device": named, "found": results}, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
