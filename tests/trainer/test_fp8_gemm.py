"""The emulated products: as exact as their operands, and the choices known to be bad look bad."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dryvine.trainer.fp8 import casts, coarse
from dryvine.trainer.fp8.engines.emulate import Emulate
from dryvine.trainer.fp8.engines.names import ENGINES, make_engine
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import E4M3, Quantized

CPU = torch.device("cpu")


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def wide(q: Quantized) -> Tensor:
    return q.dequantize().double()


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)))


def test_fprop_and_dgrad_err_no_more_than_their_operands() -> None:
    x, w = normal(200, 1000), normal(300, 1000)
    a, (b, transposed) = casts.quantize_rows(x), casts.quantize_blocks(w)
    truth = x.double() @ w.double().t()
    assert relative(Emulate().product(a, b), truth) <= 1.05 * relative(wide(a) @ wide(b).t(), truth)
    dy = normal(200, 300)
    q, back = casts.quantize_rows(dy), dy.double() @ w.double()
    assert relative(Emulate().product(q, transposed), back) <= 1.05 * relative(wide(q) @ wide(transposed).t(), back)


def test_grouped_products_and_wgrad_err_no_more_than_their_operands() -> None:
    counts = (100, 0, 28, 129)
    groups = ExpertGroups(counts, CPU)
    x, w, dy = normal(257, 384), normal(4, 256, 384), normal(257, 256)
    a, b = casts.quantize_rows(x), casts.quantize_blocks(w)[0]
    parts = x.double().split(counts), a.dequantize().double().split(counts)
    truth = torch.cat([one @ m.t() for one, m in zip(parts[0], w.double(), strict=True)])
    limit = torch.cat([one @ m.t() for one, m in zip(parts[1], wide(b), strict=True)])
    assert relative(Emulate().product(a, b, groups, torch.float32), truth) <= 1.05 * relative(limit, truth)
    total = torch.zeros(4, 256, 384)
    dq, xq = casts.quantize_columns(dy, groups), casts.quantize_columns(a, groups)
    Emulate().wgrad(dq, xq, groups, total)
    grad = torch.stack([d.t() @ one for d, one in zip(dy.double().split(counts), parts[0], strict=True)])
    starts = [128 * s for s in groups.block_starts]
    spans = [slice(first, last) for first, last in pairwise(starts)]
    limit = torch.stack([wide(dq)[:, s] @ wide(xq)[:, s].t() for s in spans])
    assert relative(total, grad) <= 1.05 * relative(limit, grad)
    assert not total[1].any(), "an expert without rows got a gradient"


def test_wgrad_adds() -> None:
    groups = ExpertGroups((5,), CPU)
    a, b = (casts.quantize_columns(normal(5, size), groups) for size in (16, 32))
    total = torch.ones(1, 16, 32)
    Emulate().wgrad(a, b, groups, total)
    torch.testing.assert_close(total[0] - 1, a.dequantize() @ b.dequantize().t(), rtol=1e-4, atol=1e-5)


def one_and(small: float, at: int) -> tuple[Quantized, Quantized]:
    """A and B [1, 128] whose product is 1 at k = 0, `small` at k = `at`, and 0 elsewhere."""
    a, b = torch.zeros(1, 128), torch.ones(1, 128)
    a[0, 0], a[0, at], b[0, at] = 1, 2.0**-9, small / 2.0**-9
    return Quantized(a.to(E4M3), torch.ones(1, 1)), Quantized(b.to(E4M3), torch.ones(1, 1))


def test_hoppers_sum_has_14_bits_between_instructions_of_32() -> None:
    def product(engine: Emulate, small: float, at: int) -> float:
        return float(engine.product(*one_and(small, at), None, torch.float32))

    # Of 1 + 2^-13 all 14 bits are kept, of 1 + 2^-14 the last is cut.
    never = Emulate("hopper", 0)
    assert product(never, 2.0**-13, 32) == 1 + 2.0**-13
    assert product(never, 2.0**-14, 32) == 1
    # Promoted every 32, each instruction's sum goes to FP32 by itself; promoted every 64 the first two are one sum.
    assert product(Emulate("hopper", 32), 2.0**-14, 32) == 1 + 2.0**-14
    assert product(Emulate("hopper", 64), 2.0**-14, 32) == 1
    assert product(Emulate("hopper", 64), 2.0**-14, 64) == 1 + 2.0**-14
    assert product(Emulate(), 2.0**-14, 32) == 1 + 2.0**-14


def test_the_hopper_accumulator_needs_promotion() -> None:
    """Section 3.5.2 of the V3 report: about 14 bits, near 2% of maximal error at K = 4096 without promotion."""
    x, w = normal(64, 8192).abs(), normal(64, 8192).abs()  # of one sign, so that sums grow as long sums do
    a, b = casts.quantize_rows(x), casts.quantize_blocks(w)[0]
    truth = wide(a) @ wide(b).t()

    def error(engine: Emulate, k: int) -> float:
        part = [Quantized(q.values[:, :k], q.scales[:, : k // 128], q.tile) for q in (a, b)]
        return relative(engine.product(*part, None, torch.float32), wide(part[0]) @ wide(part[1]).t())

    assert relative(Emulate().product(a, b, None, torch.float32), truth) < 1e-6
    promoted, never = Emulate("hopper", 128), Emulate("hopper", 0)
    assert error(promoted, 8192) < 3e-4
    assert error(never, 4096) > 20 * error(promoted, 4096)
    assert error(never, 8192) > 1.7 * error(never, 4096) > 5e-3


def test_the_longer_without_promotion_the_larger_the_error() -> None:
    """Of K = 4096: FP32 sums, 128, 512, never. (The V3 report has 2% for never, measured; this model leaves out what
    aligning the 32 products costs and has 0.4% at worst.)"""
    x, w = normal(32, 4096).abs(), normal(32, 4096).abs()
    a, b = casts.quantize_rows(x), casts.quantize_blocks(w)[0]
    truth = wide(a) @ wide(b).t()

    def worst(engine: Emulate) -> float:
        return float(((engine.product(a, b, None, torch.float32).double() - truth) / truth).abs().max())

    exact, often, seldom, never = (
        worst(Emulate(*how)) for how in (("fp32", 0), *(("hopper", n) for n in (128, 512, 0)))
    )
    assert exact < 1e-6
    assert exact < often < 2e-4, "promoted every 128: a tenth of one rounding to BF16"
    assert 2 * often < seldom < never / 4
    assert never > 3e-3


def outliers(rows: int, cols: int, seed: int) -> Tensor:
    """Sizes that differ by token over many octaves, as gradients of activations do: a 128x128 block mixes them. (E4M3
    has 18 octaves of its own, so a factor of a few hundred would not show.)"""
    size = torch.exp(4 * normal(rows, 1, seed=seed))
    return normal(rows, cols, seed=seed) * size * 1e-3


def test_blocks_on_the_dgrad_operand_are_visibly_worse() -> None:
    dy, w = outliers(256, 512, 5), normal(512, 384)
    transposed = casts.quantize_blocks(w)[1]
    truth = dy.double() @ w.double()

    def worst(q: Quantized) -> float:
        """Over tokens: the small ones are those that lose."""
        error = (Emulate().product(q, transposed, None, torch.float32).double() - truth).norm(dim=1) / truth.norm(dim=1)
        return float(error.quantile(0.9))

    fine = worst(casts.quantize_rows(dy))
    assert fine < 0.05
    assert worst(coarse.quantize_coarse(dy, "128x128")) > 3 * fine
    assert worst(coarse.quantize_coarse(dy, "tensor")) > 10 * fine


def test_one_scale_a_tensor_is_visibly_worse() -> None:
    x = normal(256, 512)
    x[:, 7] *= 1e5  # one channel far above the rest
    w = normal(256, 512)
    w[:, 7] = 0
    truth = x.double() @ w.double().t()
    b = casts.quantize_blocks(w)[0]
    by_tile = relative(Emulate().product(casts.quantize_rows(x), b, None, torch.float32), truth)
    by_tensor = relative(Emulate().product(coarse.quantize_coarse(x, "tensor"), b, None, torch.float32), truth)
    assert by_tensor > 2 * by_tile


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "emulate"])
def test_an_engine_that_cannot_run_says_why_and_what_would(name: str) -> None:
    reason = make_engine(name).missing(CPU)
    assert reason is not None
    assert "emulate" in reason
