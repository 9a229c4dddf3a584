"""Are the FP8 kernels right? Casts bit for bit against the CPU reference, products against FP64, and every product the
same bits in 21 runs. The first section of fp8.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dryvine.trainer.fp8 import casts, fused
from dryvine.trainer.fp8.engines.operands import token_major
from dryvine.trainer.fp8.engines.torch import Torch
from dryvine.trainer.fp8.kernels import hopper
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import E5M6, Quantized

ENGINES: dict[str, Any] = {"triton": hopper, "torch": Torch()}


def attempt(label: str, measure: Callable[[], float]) -> float | None:
    """A figure, or None with the reason printed: one engine that fails must not hide the others."""
    try:
        return measure()
    except Exception as error:
        print(f"    {label}: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}", flush=True)
        torch.cuda.empty_cache()
        return None


def parts(value: object) -> Iterator[Tensor]:
    if isinstance(value, Quantized):
        yield from (value.values.view(torch.uint8), value.scales)
    elif isinstance(value, E5M6):
        yield from (value.high, value.low, value.scales)
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from parts(item)


def different(ours: object, theirs: object) -> str:
    """How many elements of each part differ; empty if none."""
    counts = []
    for a, b in zip(parts(ours), parts(theirs), strict=True):
        a, b = a.cpu(), b.cpu()
        same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
        counts.append(int((~same).sum()))
    return "" if not any(counts) else f"{counts} elements"


def inputs(rows: int, cols: int) -> Iterator[tuple[str, Tensor]]:
    yield "normal", torch.randn(rows, cols)
    yield "spread", torch.randn(rows, cols) * 10 ** (torch.rand(rows, cols) * 12 - 8)
    yield "tiny", torch.randn(rows, cols) * 2.0**-130
    yield "huge", torch.randn(rows, cols) * 1e37
    fault = torch.randn(rows, cols)
    fault[0, 0], fault[1, 3], fault[2, -1] = torch.nan, torch.inf, -torch.inf
    yield "not finite", fault


def check_casts() -> int:
    bad = 0
    counts = (300, 0, 129, 128, 3)
    host, device = ExpertGroups(counts, torch.device("cpu")), ExpertGroups(counts, torch.device("cuda"))
    rows, cols = sum(counts), 512
    weights, norm = torch.rand(rows), torch.rand(cols)
    for kind, x in inputs(rows, cols):
        x, dy = x.bfloat16(), torch.randn(rows, cols // 2).bfloat16()
        gx, gdy, gw, gn = x.cuda(), dy.cuda(), weights.cuda(), norm.cuda()
        for scales in ("fp32", "ue8m0"):
            saved = casts.quantize_rows(x, scales)
            on_gpu = saved.to("cuda")
            packed = casts.pack_e5m6(x)
            pairs = {
                "rows": (casts.quantize_rows(gx, scales), saved),
                "both": (casts.quantize_both(gx, device, scales), casts.quantize_both(x, host, scales)),
                "columns of fp8": (
                    casts.quantize_columns(on_gpu, device, scales),
                    casts.quantize_columns(saved, host, scales),
                ),
                "blocks": (
                    casts.quantize_blocks(gx.float(), scales),
                    casts.quantize_blocks(x.float(), scales),
                ),
                "blocks, transposed": (
                    casts.transpose_blocks(casts.quantize_blocks(gx.float(), scales)[0]),
                    casts.quantize_blocks(x.float(), scales)[1],
                ),
                "swiglu": (fused.swiglu_rows(gx, gw, scales), fused.swiglu_rows(x, weights, scales)),
                "swiglu backward": (
                    fused.swiglu_backward(gdy, on_gpu, gw, device, scales)[:3],
                    fused.swiglu_backward(dy, saved, weights, host, scales)[:3],
                ),
                "rmsnorm": (fused.rmsnorm_rows(gx, gn, 1e-6, scales), fused.rmsnorm_rows(x, norm, 1e-6, scales)),
                "e5m6": (casts.pack_e5m6(gx), packed),
                "e5m6 read": (
                    casts.unpack_e5m6(E5M6(packed.high.cuda(), packed.low.cuda(), token_major(packed.scales.cuda()))),
                    casts.unpack_e5m6(packed),
                ),
            }  # fmt: skip
            for name, (ours, theirs) in pairs.items():
                if count := different(ours, theirs):
                    bad += 1
                    print(f"  DIFFERS {name}, {kind}, {scales}: {count}")
    print(f"casts: {'all bits equal' if not bad else f'{bad} cases differ'}", flush=True)
    return bad


def operands(m: int, n: int, k: int, experts: int = 0) -> tuple[Quantized, Quantized]:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(*([experts] if experts else []), n, k, device="cuda", dtype=torch.bfloat16)
    return casts.quantize_rows(x), casts.quantize_blocks(w)[0]


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def truth_product(a: Quantized, b: Quantized, groups: ExpertGroups | None) -> Tensor:
    x, w = a.dequantize(torch.float32).double(), b.dequantize(torch.float32).double()
    if groups is None:
        return x @ w.t()
    return torch.cat([part @ one.t() for part, one in zip(x.split(list(groups.counts)), w, strict=True)])


PRODUCTS = [(256, 256, 512, ()), (100, 2112, 7168, ()), (4096, 576, 1536, ()), (333, 7168, 2112, ()),
            (630, 384, 256, (129, 0, 1, 500)), (4024, 4096, 7168, (1000, 24, 0, 3000))]  # fmt: skip
WGRADS = [(256, 384, (130, 0, 1, 512)), (4096, 7168, (1000, 24, 0, 3000)), (2112, 1536, (4096,))]


def check_product(engine: Any, m: int, n: int, k: int, counts: tuple[int, ...]) -> float:
    groups = ExpertGroups(counts, torch.device("cuda")) if counts else None
    a, b = operands(m, n, k, len(counts))
    y = engine.product(a, b, groups)
    for _ in range(20):
        if not torch.equal(y, engine.product(a, b, groups)):
            raise AssertionError("other bits in a second run")
    return relative(y, truth_product(a, b, groups))


def check_wgrad(engine: Any, m: int, n: int, counts: tuple[int, ...]) -> float:
    groups = ExpertGroups(counts, torch.device("cuda"))
    a, b = (casts.quantize_columns(torch.randn(sum(counts), size, device="cuda").bfloat16(), groups) for size in (m, n))
    total = torch.randn(len(counts), m, n, device="cuda")
    before, truth = total.clone(), total.double()
    for expert, part_a, part_b in _ranges(a, b, groups):
        truth[expert] += part_a @ part_b.t()
    engine.wgrad(a, b, groups, total)
    for _ in range(20):  # a race shows as other bits, long before it shows as an error
        again = before.clone()
        engine.wgrad(a, b, groups, again)
        if not torch.equal(again, total):
            raise AssertionError("other bits in a second run")
    return relative(total, truth)


def check_products() -> int:
    """BF16 rounds results by 2^-9, FP32 sums leave only what Hopper's 14 bits lose within 128 of K."""
    bad = 0
    for name, engine in ENGINES.items():
        for kind, bound, measure, cases in (
            ("product", 2e-3, check_product, PRODUCTS),
            ("wgrad", 1.6e-4, check_wgrad, WGRADS),
        ):
            for case in cases:
                label = f"{name} {kind} {case}"
                error = attempt(label, lambda m=measure, e=engine, c=case: m(e, *c))
                good = error is not None and error < bound
                bad += not good
                print(f"  {'ok   ' if good else 'WRONG'} {label}: {error if error is None else f'{error:.2e}'}")
    print(f"products: {'all within bounds' if not bad else f'{bad} cases wrong'}", flush=True)
    return bad


def _ranges(a: Quantized, b: Quantized, groups: ExpertGroups) -> Iterator[tuple[int, Tensor, Tensor]]:
    x, y = a.dequantize().double(), b.dequantize().double()
    starts = [128 * start for start in groups.block_starts]
    for expert, (first, last) in enumerate(pairwise(starts)):
        yield expert, x[:, first:last], y[:, first:last]
