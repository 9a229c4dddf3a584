"""The reference quantisers keep their promises: error bounds, layouts, groups, faults that stay loud."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dryvine.trainer.fp8 import casts, coarse, fused, numbers
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.tiles import AMAX_FLOOR, E4M3_MAX

CPU = torch.device("cpu")
shapes = st.tuples(st.integers(1, 70), st.integers(1, 300))
powers = st.floats(-9, 9)
formats = st.sampled_from(["fp32", "ue8m0"])


def draw(shape: tuple[int, ...], power: float, seed: int) -> Tensor:
    """Normal numbers of a size, some rows far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10.0**power
    return x * 10.0 ** torch.randn(shape[0], 1, generator=generator)


@settings(max_examples=60, deadline=None)
@given(shapes, powers, formats, st.integers(0, 1 << 30))
def test_a_row_tile_comes_back_within_half_a_step(shape: tuple[int, int], power: float, form: str, seed: int) -> None:
    x = draw(shape, power, seed)
    q = casts.quantize_rows(x, form)  # type: ignore[arg-type]
    step = q.scales.repeat_interleave(128, 1)[:, : shape[1]] * 2.0**-9  # of E4M3's subnormals
    bound = torch.maximum(x.abs() * 2.0**-4, step / 2) * (1 + 1e-5)  # half a unit of 3 mantissa bits
    assert ((q.dequantize() - x).abs() <= bound).all()


@settings(max_examples=60, deadline=None)
@given(shapes, powers, formats, st.integers(0, 1 << 30))
def test_the_scale_is_the_smallest_that_holds_the_tile(
    shape: tuple[int, int], power: float, form: str, seed: int
) -> None:
    x = draw(shape, power, seed)
    q = casts.quantize_rows(x, form)  # type: ignore[arg-type]
    padded = torch.nn.functional.pad(x, (0, -shape[1] % 128)).unflatten(1, (-1, 128))
    least = padded.abs().amax(-1).clamp(min=AMAX_FLOOR) / E4M3_MAX
    if form == "fp32":
        torch.testing.assert_close(q.scales, least, rtol=1e-6, atol=0)
    else:
        assert (q.scales >= least * (1 - 1e-6)).all()
        assert (q.scales < least * 2 * (1 + 1e-6)).all()
        assert (torch.frexp(q.scales).mantissa == 0.5).all(), "not powers of two"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=4), st.integers(1, 200), st.integers(0, 1 << 30))
def test_columns_are_each_experts_rows_transposed(counts: list[int], cols: int, seed: int) -> None:
    x = draw((sum(counts), cols), 0, seed) if sum(counts) else torch.empty(0, cols)
    groups = ExpertGroups(tuple(counts), CPU)
    q = casts.quantize_columns(x, groups)
    assert q.values.shape == (cols, 128 * groups.blocks)
    back = q.dequantize()
    first = 0
    for block, part in zip(groups.block_starts, x.split(counts), strict=False):
        ours = back[:, 128 * block : 128 * block + len(part)]
        alone = casts.quantize_rows(part.t().contiguous()).dequantize() if len(part) else part.t()
        assert torch.equal(ours, alone)
        first += len(part)
    assert int((back != 0).sum()) <= x.numel(), "padding is not zero"


def test_a_weight_and_its_transposed_copy_are_one_quantisation() -> None:
    w = draw((390, 200), 0, 1).view(3, 130, 200)
    q, transposed = casts.quantize_blocks(w)
    assert torch.equal(q.dequantize().transpose(1, 2), transposed.dequantize())
    amax = w[0, :128, :128].abs().max()
    assert q.scales[0, 0, 0] == amax / E4M3_MAX
    assert q.scales.stride(-2) % 4 == 0, "scaled_mm wants rows of scales padded to 4"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), powers, st.integers(0, 1 << 30))
def test_e5m6_comes_back_within_half_a_step(rows: int, tiles: int, power: float, seed: int) -> None:
    x = draw((rows, 128 * tiles), power, seed)
    packed = casts.pack_e5m6(x)
    step = packed.scales.repeat_interleave(128, 1) * 2.0**-20
    bound = torch.maximum(x.abs() * 2.0**-7, step / 2) * (1 + 1e-5)
    assert ((casts.unpack_e5m6(packed, torch.float32) - x).abs() <= bound).all()
    assert packed.high.nbytes + packed.low.nbytes == x.numel() * 3 // 2


def test_scales_of_e5m6_are_powers_of_two() -> None:
    scales = casts.pack_e5m6(draw((20, 256), 2, 5)).scales
    assert (torch.frexp(scales).mantissa == 0.5).all()


def test_coarse_tiles_share_the_scale_of_their_largest_number() -> None:
    x = torch.ones(130, 256)
    x[3, 7], x[129, 200], x[5, 130] = 448, 4480, 44.8
    # Blocks of 128 rows and columns: the first with 448, right of it 44.8, below with 1 and 4480.
    amax = torch.ones(130, 2)
    amax[:128] = torch.tensor([448, 44.8])
    amax[128:, 1] = 4480
    torch.testing.assert_close(coarse.quantize_coarse(x, "128x128").scales * E4M3_MAX, amax)
    torch.testing.assert_close(coarse.quantize_coarse(x, "tensor").scales * E4M3_MAX, torch.full((130, 2), 4480.0))
    weights = torch.stack((x, 2 * x))
    q, transposed = coarse.quantize_whole(weights)
    for one, most in ((0, 4480.0), (1, 8960.0)):
        torch.testing.assert_close(q.scales[one] * E4M3_MAX, torch.full((2, 2), most))
    assert torch.equal(q.dequantize().transpose(1, 2), transposed.dequantize())


def test_all_e5m6_codes_survive_a_round_trip() -> None:
    codes = torch.arange(4096, dtype=torch.int32)
    values = (codes << 4).to(torch.int16).view(torch.float16).float()
    values = values[values.isfinite()]
    assert torch.equal(casts._e5m6(values), codes[(codes & 0x7C0) != 0x7C0])


def test_dispatched_rows_keep_their_bits_when_quantised_again() -> None:
    x = draw((50, 300), 0, 3)
    once = casts.quantize_rows(x, "ue8m0")
    again = casts.quantize_rows(once.dequantize(torch.bfloat16), "ue8m0")
    assert torch.equal(once.dequantize(), again.dequantize())


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_number_poisons_its_tile_and_no_other(fault: float) -> None:
    x = torch.ones(4, 256)
    x[1, 130] = fault
    back = casts.quantize_rows(x).dequantize()
    assert back[1, 128:].isnan().all()
    assert int(back.isnan().sum()) == 128
    columns = casts.quantize_columns(x, ExpertGroups((4,), CPU)).dequantize()
    assert columns[130].isnan().all()
    assert int(columns.isnan().sum()) == 128


def test_the_sigmoid_is_a_sigmoid() -> None:
    x = torch.linspace(-80, 80, 20001)
    torch.testing.assert_close(numbers.sigmoid(x).double(), torch.sigmoid(x.double()), rtol=2e-5, atol=0)
    near = torch.linspace(-8, 8, 20001)
    torch.testing.assert_close(numbers.sigmoid(near).double(), torch.sigmoid(near.double()), rtol=2e-6, atol=0)


def test_swiglu_backward_is_the_gradient_of_swiglu() -> None:
    h = (draw((37, 512), 0, 4) / 3).requires_grad_()
    weights = torch.rand(37, requires_grad=True)
    dy = torch.randn(37, 256)
    kept = Quantized(*_exact(h.detach()))
    leaf = kept.dequantize().requires_grad_()
    (torch.nn.functional.silu(leaf[:, :256]) * leaf[:, 256:] * weights[:, None]).backward(dy)
    dh, dh_transposed, act, dweights = fused.swiglu_backward(dy, kept, weights.detach(), ExpertGroups((37,), CPU))
    assert leaf.grad is not None
    assert weights.grad is not None
    for ours in (dh.dequantize(), dh_transposed.dequantize().t()[:37]):
        assert float((ours - leaf.grad).norm() / leaf.grad.norm()) < 0.04
    torch.testing.assert_close(dweights, weights.grad, rtol=1e-4, atol=1e-4)
    gate, up = kept.dequantize().chunk(2, -1)
    product = torch.nn.functional.silu(gate) * up * weights.detach()[:, None]
    assert float((act.dequantize().t()[:37] - product).norm() / product.norm()) < 0.04


def _exact(x: Tensor) -> tuple[Tensor, Tensor]:
    q = casts.quantize_rows(x)
    return q.values, q.scales
