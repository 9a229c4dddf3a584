"""FP8 on one GPU: are the kernels right, and how fast are they beside BF16 and the chip's measured limits?

    python -m benchmarks.fp8.kernels --device cuda [--section check|product|wgrad|casts] [--tune]

Correctness first (casts bit for bit against the CPU reference, products against float64), then DeepSeek-V3's shapes.
Each section runs in a process of its own with a deadline, so that a kernel that hangs costs one table and not all.
Times are medians of CUDA-graph replays over rotating operands (launch cost and the L2 stay out of them).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.support.fp8_checks import attempt, check_casts, check_products, operands
from dryvine.trainer.fp8 import casts, fused
from dryvine.trainer.fp8.engines.torch import Torch
from dryvine.trainer.fp8.kernels import hopper
from dryvine.trainer.model.kernels import grouped
from dryvine.trainer.tensors.groups import ExpertGroups

DENSE = [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048)]  # (N, K), with M = 4096 tokens
EXPERTS = [(4096, 7168), (7168, 2048)]  # gate_up, down
GROUPS = [(4, 8192), (8, 4096)]  # experts, tokens each
SECTIONS = {"check": 120, "product": 150, "wgrad": 120, "casts": 60}  # seconds allowed


Row = tuple[str, dict[str, float | None]]

# ---- timing


def median_ms(run: Callable[[int], object], sets: int, calls: int = 6, replays: int = 7) -> float:
    """Milliseconds of run(i), i cycling over `sets` operand sets; the median over graph replays of `calls` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(sets):
            run(i)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            run(i % sets)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def limits() -> dict[str, float]:
    """Bytes read and written by the fastest of three copies of 2 GiB (a copy engine may be slower than a kernel)."""
    source = torch.empty(1 << 29, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    copies = {
        "copy_": lambda i: target.copy_(source),
        "neg": lambda i: torch.neg(source, out=target),
        "clone of rows": lambda i: torch.mul(source.view(-1, 8192), 2.0, out=target.view(-1, 8192)),
    }
    speeds = {name: 2 * source.nbytes / median_ms(run, 1) / 1e9 for name, run in copies.items()}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    print("copies, TB/s:", {name: round(speed, 2) for name, speed in speeds.items()})
    return {"copy_TB_s": max(speeds.values()), "bf16_TFLOPS": 2 * 8192**3 / median_ms(lambda i: a @ b, 1) / 1e9}


# ---- speed


def table(title: str, rows: list[Row], unit: str) -> None:
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    print(f"\n{title} [{unit}]")
    print("  " + " " * 26 + "".join(f"{name:>16}" for name in names))
    for label, row in rows:
        cells = "".join(f"{'-' if row.get(name) is None else f'{row[name]:.0f}':>16}" for name in names)
        print(f"  {label:26}{cells}")
    sys.stdout.flush()


def product_configs(tune: bool) -> dict[str, hopper.TileConfig]:
    base = hopper.PRODUCT
    if not tune:
        return {"triton": base}
    return {"128x256 s4": base, "128x256 s3": replace(base, stages=3), "128x256 g16": replace(base, group_m=16)}


def wgrad_configs(tune: bool) -> dict[str, hopper.TileConfig]:
    base = hopper.WGRAD
    if not tune:
        return {"triton": base}
    return {
        "128x256 s4 g16": base,
        "128x256 s4 g8": replace(base, group_m=8),
        "128x128 s6 g16": replace(base, count=1, stages=6),
    }


def rates(flops: float, sets: int, runs: dict[str, Callable[[int], object]]) -> dict[str, float | None]:
    """TFLOPS of each contender; None for one that failed."""
    return {name: attempt(name, lambda run=run: flops / median_ms(run, sets) / 1e9) for name, run in runs.items()}


def shapes() -> Iterator[tuple[str, int, int, int, tuple[int, ...]]]:
    """Label, M (all rows), N, K and rows by expert."""
    for n, k in DENSE:
        yield f"4096 x {n} x {k}", 4096, n, k, ()
    for experts, tokens in GROUPS:
        for n, k in EXPERTS:
            yield f"{experts}x{tokens} x {n} x {k}", experts * tokens, n, k, (tokens,) * experts


def product_row(tune: bool, m: int, n: int, k: int, counts: tuple[int, ...]) -> dict[str, float | None]:
    groups = ExpertGroups(counts, torch.device("cuda")) if counts else None
    ends = torch.tensor(counts, device="cuda").cumsum(0).int() if counts else None
    sets = [operands(m, n, k, len(counts)) for _ in range(3)]
    wide = [(a.dequantize(torch.bfloat16), b.dequantize(torch.bfloat16)) for a, b in sets]

    def bf16(i: int) -> Tensor:
        x, w = wide[i]
        return x @ w.t() if ends is None else torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=ends)

    runs: dict[str, Callable[[int], object]] = {"bf16": bf16}
    for name, config in product_configs(tune).items():
        runs[name] = lambda i, config=config: hopper.product(*sets[i], groups, config=config)
    runs["torch"] = lambda i: Torch().product(*sets[i], groups)
    return rates(2 * m * n * k, len(sets), runs)


def wgrad_row(tune: bool, m: int, n: int, counts: tuple[int, ...]) -> dict[str, float | None]:
    groups = ExpertGroups(counts, torch.device("cuda"))
    wide = [[torch.randn(sum(counts), size, device="cuda").bfloat16() for size in (m, n)] for _ in range(2)]
    sets = [[casts.quantize_columns(x, groups) for x in pair] for pair in wide]
    total = torch.zeros(len(counts), m, n, device="cuda")

    def bf16(i: int) -> None:
        dy, x = wide[i]
        for one, dy_part, x_part in zip(total, dy.split(counts), x.split(counts), strict=True):
            torch.addmm(one, dy_part.t(), x_part, out_dtype=torch.float32, out=one)

    runs: dict[str, Callable[[int], object]] = {
        "bf16": bf16,
        "bf16 own": lambda i: grouped.wgrad(*wide[i], groups, total),
    }
    for name, config in wgrad_configs(tune).items():
        runs[name] = lambda i, config=config: hopper.wgrad(*sets[i], groups, total, config)
    runs["torch"] = lambda i: Torch().wgrad(*sets[i], groups, total)
    return rates(2 * sum(counts) * m * n, len(sets), runs)


def speed_products(tune: bool) -> None:
    rows = [(label, product_row(tune, m, n, k, counts)) for label, m, n, k, counts in shapes()]
    table("Fprop and Dgrad", rows, "TFLOPS")


def speed_wgrad(tune: bool) -> None:
    rows = [(label, wgrad_row(tune, n, k, counts or (m,))) for label, m, n, k, counts in shapes()]
    table("Wgrad (tokens x N x K), added in place to FP32", rows, "TFLOPS")


def speed_casts(copy: float) -> None:
    tokens, hidden, width, experts = 32768, 7168, 2048, 4
    groups = ExpertGroups((tokens // experts,) * experts, torch.device("cuda"))
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    h = torch.randn(tokens, 2 * width, device="cuda").bfloat16()
    dy = torch.randn(tokens, width, device="cuda").bfloat16()
    weights, norm = torch.rand(tokens, device="cuda"), torch.rand(hidden, device="cuda")
    w = torch.randn(experts, 2 * width, hidden, device="cuda")
    saved, kept, packed = casts.quantize_rows(x), casts.quantize_rows(h), casts.pack_e5m6(x)
    blocks = casts.quantize_blocks(w)[0]
    many, few = x.numel(), dy.numel()
    work: dict[str, tuple[float, Callable[[int], object]]] = {
        "rows": (3 * many, lambda i: casts.quantize_rows(x)),
        "columns": (3 * many, lambda i: casts.quantize_columns(x, groups)),
        "columns of fp8": (2 * many, lambda i: casts.quantize_columns(saved, groups)),
        "rows and columns": (4 * many, lambda i: casts.quantize_both(x, groups)),
        "weight blocks, both ways": (6 * w.numel(), lambda i: casts.quantize_blocks(w)),
        "weight blocks, transposed": (2 * w.numel(), lambda i: casts.transpose_blocks(blocks)),
        "swiglu": (7 * few, lambda i: fused.swiglu_rows(h, weights)),
        "swiglu backward": (9 * few, lambda i: fused.swiglu_backward(dy, kept, weights, groups)),
        "rmsnorm": (5 * many, lambda i: fused.rmsnorm_rows(x, norm, 1e-6)),
        "e5m6 pack": (3.5 * many, lambda i: casts.pack_e5m6(x)),
        "e5m6 unpack": (3.5 * many, lambda i: casts.unpack_e5m6(packed)),
    }
    rows: list[Row] = []
    for name, (size, run) in work.items():
        rate = attempt(name, lambda size=size, run=run: size / median_ms(run, 1) / 1e9)
        rows.append((name, {"GB/s": rate and 1000 * rate, "% of copy": rate and 100 * rate / copy}))
    table("Casts", rows, "GB/s read and written")


def cast_share() -> None:
    """One microbatch through this rank's experts of one V3 layer, forward and backward: how much of it is casts?"""
    tokens, hidden, width, experts = 32768, 7168, 2048, 4
    groups = ExpertGroups((tokens // experts,) * experts, torch.device("cuda"))
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    h, dy = (
        torch.randn(tokens, 2 * width, device="cuda").bfloat16(),
        torch.randn(tokens, width, device="cuda").bfloat16(),
    )
    weights = torch.rand(tokens, device="cuda")
    up, up_t = casts.quantize_blocks(torch.randn(experts, 2 * width, hidden, device="cuda"))
    down, down_t = casts.quantize_blocks(torch.randn(experts, hidden, width, device="cuda"))
    xq, (act, kept) = casts.quantize_rows(x), fused.swiglu_rows(h, weights)
    dx_columns = casts.quantize_columns(x, groups)
    dh, dh_t, act_t, _ = fused.swiglu_backward(dy, kept, weights, groups)
    total_up, total_down = (torch.zeros(experts, *s, device="cuda") for s in ((2 * width, hidden), (hidden, width)))
    quantisers = {  # rows of x and of dy arrive in FP8
        "swiglu": lambda i: fused.swiglu_rows(h, weights),
        "swiglu backward": lambda i: fused.swiglu_backward(dy, kept, weights, groups),
        "dy columns": lambda i: casts.quantize_columns(xq, groups),
        "x columns": lambda i: casts.quantize_columns(xq, groups),
    }
    products = {
        "up": lambda i: hopper.product(xq, up, groups),
        "down": lambda i: hopper.product(act, down, groups),
        "down dgrad": lambda i: hopper.product(xq, down_t, groups),
        "up dgrad": lambda i: hopper.product(dh, up_t, groups),
        "down wgrad": lambda i: hopper.wgrad(dx_columns, act_t, groups, total_down),
        "up wgrad": lambda i: hopper.wgrad(dh_t, dx_columns, groups, total_up),
    }
    spent = {
        kind: {name: median_ms(run, 1) for name, run in group.items()}
        for kind, group in (("casts", quantisers), ("products", products))
    }
    sums = {kind: sum(times.values()) for kind, times in spent.items()}
    print(
        "\nexperts of a V3 layer, 4 x 8192 rows, ms: "
        + json.dumps({k: {n: round(t, 3) for n, t in v.items()} for k, v in spent.items()})
    )
    share = sums["casts"] / sum(sums.values())
    print(f"casts {sums['casts']:.2f} ms, products {sums['products']:.2f} ms: casts are {100 * share:.1f}%")


def section(name: str, tune: bool) -> int:
    torch.manual_seed(0)
    if name == "check":
        return check_casts() + check_products()
    if name == "product":
        limit = limits()
        print("limits:", json.dumps({key: round(value, 2) for key, value in limit.items()}))
        speed_products(tune)
    elif name == "wgrad":
        speed_wgrad(tune)
    else:
        speed_casts(limits()["copy_TB_s"])
        cast_share()
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--section", choices=list(SECTIONS))
    parser.add_argument("--tune", action="store_true", help="time several tile shapes, stages and walks of each kernel")
    arguments = parser.parse_args()
    if arguments.section:
        sys.exit(section(arguments.section, arguments.tune))
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name, seconds in SECTIONS.items():
        started = time.monotonic()
        command = [sys.executable, "-m", __spec__.name, "--section", name, *(["--tune"] if arguments.tune else [])]
        try:
            code = subprocess.run(command, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        print(f"-- {name}: exit {code}, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
