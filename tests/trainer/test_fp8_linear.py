"""FP8 Linear and FFN: all three products against FP64, deferred dW, one weight cast a step, what is kept, the guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.engines.emulate import Emulate
from dryvine.trainer.fp8.ffn import FP8FFN
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.guard import culprits
from dryvine.trainer.fp8.linear import FP8Linear
from dryvine.trainer.fp8.recipe import preset
from dryvine.trainer.model.norm import RMSNorm
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.weight import Closure, Weight


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)))


def make(**changes: object) -> FP8:
    return FP8(preset("deepseek_v3", **changes), Emulate(), "")


def ffn(
    fp8: FP8, x: Tensor, up: Weight, down: Weight, counts: tuple[int, ...] | None = None, weights: Tensor | None = None
) -> Tensor:
    groups = fp8.all_rows(x) if counts is None else ExpertGroups.of(counts, x)
    return FP8FFN(fp8, up, down, groups)(x, weights)


def relative(ours: Tensor, truth: Tensor) -> float:
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / truth.norm())


def test_all_three_products_of_a_linear_are_near_fp64() -> None:
    fp8, w, x, dy = make(), Weight(normal(144, 200)), normal(70, 200).requires_grad_(), normal(70, 144)
    y = FP8Linear(w, fp8)(x)
    y.backward(dy)
    assert x.grad is not None
    assert w.grad is None, "autograd got a weight gradient too"
    wide_x, wide_w, wide_dy = (t.detach().double() for t in (x, w, dy))
    truths = wide_x @ wide_w.t(), wide_dy @ wide_w, wide_dy.t() @ wide_x
    for ours, truth in zip((y, x.grad, w.gradient()), truths, strict=True):
        assert 0.01 < relative(ours, truth) < 0.05, "E4M3 on both sides errs by about 3.5%"


def test_after_attention_the_input_is_kept_finer() -> None:
    """E5M6 leaves one quantisation in Wgrad's operand where FP8 leaves two."""
    x, dy = normal(100, 256), normal(100, 128)
    truth, errors = dy.t().double() @ x.double(), {}
    for kept in ("e5m6", "fp8"):
        fp8, w = make(cache_after_attention=kept), Weight(normal(128, 256))
        FP8Linear(w, fp8, after_attention=True)(x.requires_grad_()).backward(dy)
        errors[kept] = relative(w.gradient(), truth)
    assert errors["e5m6"] < 0.95 * errors["fp8"]


def experts(fp8: FP8, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
    rows, hidden, width = sum(counts), 128, 96
    up, down = Weight(normal(len(counts), 2 * width, hidden) / 11), Weight(normal(len(counts), hidden, width) / 10)
    x, weights = normal(rows, hidden).requires_grad_(), torch.rand(rows, requires_grad=True)
    dy = normal(rows, hidden, seed=3)
    y = ffn(fp8, x, up, down, counts, weights)
    y.backward(dy)
    assert x.grad is not None
    assert weights.grad is not None
    leaves = [t.detach().double().requires_grad_() for t in (x, weights, up, down)]
    parts = []
    for rows_, weight, u, d in zip(leaves[0].split(counts), leaves[1].split(counts), leaves[2], leaves[3], strict=True):
        gate, lift = (rows_ @ u.t()).chunk(2, -1)
        parts.append(functional.silu(gate) * lift * weight[:, None] @ d.t())
    truth = torch.cat(parts)
    truth.backward(dy.double())
    for ours, leaf in zip((x.grad, weights.grad, up.gradient(), down.gradient()), leaves, strict=True):
        assert leaf.grad is not None
        assert 0.005 < relative(ours, leaf.grad) < 0.09
    assert relative(y, truth) < 0.07
    return x, weights, up, down


@pytest.mark.parametrize("counts", [(33, 0, 130), (64,)])
def test_experts_are_near_fp64(counts: tuple[int, ...]) -> None:
    experts(make(), counts)


def test_a_rank_whose_experts_got_no_rows() -> None:
    fp8, up, down = make(), Weight(normal(2, 64, 32)), Weight(normal(2, 32, 32))
    x, weights = torch.zeros(0, 32, requires_grad=True), torch.zeros(0, requires_grad=True)
    ffn(fp8, x, up, down, (0, 0), weights).sum().backward()
    assert x.grad is not None
    assert not up.gradient().any()


def test_a_dense_ffn_is_one_expert() -> None:
    x, up, down = normal(40, 64), normal(96, 64), normal(64, 48)
    dense = ffn(make(), x, Weight(up), Weight(down))
    assert torch.equal(dense, ffn(make(), x, Weight(up[None]), Weight(down[None]), (40,)))


def test_dw_waits_for_its_turn_and_adds() -> None:
    fp8, w, x = make(), Weight(normal(32, 64)), normal(10, 64).requires_grad_()
    closures: list[Closure] = []
    w.queue = closures.append
    FP8Linear(w, fp8)(x).backward(normal(10, 32))
    assert x.grad is not None
    assert w.main_grad is None
    closures[0]()
    once = w.gradient().clone()
    w.queue = None
    FP8Linear(w, fp8)(x).backward(normal(10, 32))
    torch.testing.assert_close(w.gradient(), 2 * once)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    calls: list[int] = []
    original: Callable[..., object] = getattr(casts, name)

    def spy(*args: object, **named: object) -> object:
        calls.append(1)
        return original(*args, **named)

    monkeypatch.setattr(casts, name, spy)
    return calls


def test_a_weight_is_cast_once_a_step_and_again_after_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8, w = make(), Weight(normal(32, 64))
    calls = counted(monkeypatch, "quantize_blocks")
    x = normal(10, 64).requires_grad_()
    for _ in range(3):
        FP8Linear(w, fp8)(x).sum().backward()
    assert len(calls) == 1
    before = FP8Linear(w, fp8)(x)
    with torch.no_grad():
        w.mul_(2)
    fp8.cache.expire()
    assert torch.equal(FP8Linear(w, fp8)(x), 2 * before)
    assert len(calls) == 2


def test_transposes_that_are_not_kept_have_the_same_bits_before_and_after_an_update() -> None:
    x, w = normal(150, 256), Weight(normal(384, 256))
    kept, made = (FP8(preset("deepseek_v3"), Emulate(), "", transposes) for transposes in (True, False))
    for _ in range(2):
        for fp8 in (kept, made):
            fp8.cache.expire()
        one, other = (_input_gradient(FP8Linear(w, fp8), x) for fp8 in (kept, made))
        assert torch.equal(one, other)
        assert made.cache.dgrad(w) is not made.cache.dgrad(w)
        assert kept.cache.dgrad(w) is kept.cache.dgrad(w)
        with torch.no_grad():
            w.mul_(-3)


def _input_gradient(project: FP8Linear, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    project(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


def test_a_cast_that_is_handed_in_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8, a, b = make(), Weight(normal(32, 64)), Weight(normal(48, 64))
    x = normal(10, 64)
    alone, rows = [FP8Linear(w, fp8)(x) for w in (a, b)], fp8.rows(x)
    calls = counted(monkeypatch, "quantize_rows")
    for y, w in zip(alone, (a, b), strict=True):
        assert torch.equal(y, FP8Linear(w, fp8)(x, rows))
    assert not calls


def kept_bytes(run: Callable[[], Tensor]) -> int:
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


def test_what_is_kept_is_as_predicted_and_half_of_bf16() -> None:
    rows, hidden, width = 512, 256, 384
    fp8, up, down = make(), Weight(normal(2 * width, hidden)), Weight(normal(hidden, width))
    x = normal(rows, hidden).bfloat16().requires_grad_()
    scaled = 1 + 4 / 128  # a byte a value, four a tile
    assert kept_bytes(lambda: ffn(fp8, x, up, down)) == rows * (hidden + 2 * width) * scaled
    assert kept_bytes(lambda: FP8Linear(up, fp8)(x)) == rows * hidden * scaled
    assert kept_bytes(lambda: FP8Linear(up, fp8, after_attention=True)(x)) == rows * hidden * (1.5 + 4 / 128)


BAD = [
    ("gradient_tile", "128x128"),
    ("gradient_tile", "tensor"),
    ("activation_tile", "tensor"),
    ("weight_tile", "tensor"),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_bad_choices_run_and_are_worse(key: str, value: str) -> None:
    """On operands with tokens and weights of very different sizes."""
    size = torch.exp(4 * normal(200, 1))
    x, dy, w = normal(200, 256) * size, normal(200, 128) / size, normal(128, 256)
    w[:, 128:] *= 1e-6

    def errors(fp8: FP8) -> tuple[float, ...]:
        leaf, weight = x.clone().requires_grad_(), Weight(w)
        y = FP8Linear(weight, fp8)(leaf)
        y.backward(dy)
        assert leaf.grad is not None
        truth, back = x.double() @ w.double().t(), dy.double() @ w.double()
        by_row = [(o.detach() - t).norm(dim=1) / t.norm(dim=1) for o, t in ((y, truth), (leaf.grad, back))]
        return *(float(e.quantile(0.9)) for e in by_row), relative(leaf.grad[:, 128:], back[:, 128:])

    good, bad = errors(make()), errors(make(**{key: value}))
    assert any(worse > 2 * fine for worse, fine in zip(bad, good, strict=True))


def test_the_guard_counts_bad_and_floored_tiles_by_name() -> None:
    fp8, w = make(), Weight(normal(32, 256))
    x = normal(4, 256)
    x[0, 3], x[1, 128:] = torch.nan, 1e-6
    FP8Linear(w, fp8)(x)
    fp8.guard.on = True
    FP8Linear(w, fp8)(x.clone())
    FP8Linear(w, fp8)(normal(4, 256))
    (count,) = fp8.guard.take([("layers.0.o.weight", w)])
    assert count == ("layers.0.o.weight: input", 1, 1, 16)
    assert not list(fp8.guard.take([]))


def test_the_culprit_is_named() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, torch.nan])
    assert culprits([("a", good), ("b", bad), ("c", None)]) == ["b"]


def test_values_are_those_of_the_paper() -> None:
    q = casts.quantize_rows(torch.full((1, 128), 0.5))
    assert isinstance(q, Quantized)
    assert q.values.float().eq(448).all()
    assert q.scales.item() == pytest.approx(0.5 / 448)


class Recorder(Emulate):
    """Emulates, and keeps the operands that it got."""

    operands: ClassVar[list[Quantized]] = []

    def single(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        self.operands.extend((a, b))
        return super().single(a, b, dtype)


@pytest.mark.parametrize("kept", ["fp8", "e5m6"])
def test_every_operand_has_the_scales_of_the_recipe(kept: str) -> None:
    """Of a norm, a Linear and an FFN, forward and backward."""
    engine = Recorder()
    fp8 = FP8(preset("deepseek_v3", scales="ue8m0", cache_after_attention=kept), engine, "")
    norm, x = RMSNorm(Weight(torch.rand(128)), 1e-6, fp8), normal(40, 128).requires_grad_()
    project = FP8Linear(Weight(normal(128, 128)), fp8, after_attention=True)
    up, down = Weight(normal(256, 128)), Weight(normal(128, 128))
    engine.operands.clear()
    normed, rows = norm(x)
    y = project(normed, rows)
    ffn(fp8, y, up, down).square().sum().backward()
    # Three products of each of three weights.
    assert len(engine.operands) == 2 * 3 * 3
    for operand in engine.operands:
        assert (torch.frexp(operand.scales).mantissa == 0.5).all(), "not a power of two"


def test_the_guard_knows_which_operand_is_whose() -> None:
    """By the number of tiles: 4 rows of x in 1 tile, act in 2, dy in 1, and d gate_up in 4."""
    fp8, up, down = make(), Weight(normal(512, 128)), Weight(normal(128, 256))
    fp8.guard.on = True
    ffn(fp8, normal(4, 128).requires_grad_(), up, down).sum().backward()
    tiles = {count.name: count.tiles for count in fp8.guard.take([("up", up), ("down", down)])}
    assert tiles == {"up: input": 4, "down: input": 8, "down: output gradient": 4, "up: output gradient": 16}
    project = Weight(normal(256, 128))
    FP8Linear(project, fp8)(normal(4, 128).requires_grad_()).sum().backward()
    tiles = {count.name: count.tiles for count in fp8.guard.take([("project", project)])}
    assert tiles == {"project: input": 4, "project: output gradient": 8}


def test_tiles_just_above_the_floor_are_not_counted() -> None:
    fp8, w = make(), Weight(normal(32, 128))
    fp8.guard.on = True
    for amax in (0.99e-4, 1.01e-4):
        FP8Linear(w, fp8)(torch.full((1, 128), amax))
    (count,) = fp8.guard.take([("w", w)])
    assert (count.floored, count.tiles) == (1, 2)


def test_only_the_input_after_attention_is_kept_finer() -> None:
    """All else is kept in FP8, also where the recipe has E5M6."""
    x, fp8 = normal(64, 256).requires_grad_(), make()
    for place, recipe, packed in ((True, "e5m6", True), (False, "e5m6", False), (True, "fp8", False)):
        fp8 = make(cache_after_attention=recipe)
        y = FP8Linear(Weight(normal(128, 256)), fp8, after_attention=place)(x)
        assert (len(y.grad_fn.saved_tensors) == 3) == packed  # type: ignore[union-attr]


def test_a_width_that_ends_within_a_tile_keeps_its_gradient() -> None:
    """E5M6 has whole tiles only, and what fills the last one up is no column of the weight."""
    x, dy, errors = normal(50, 200), normal(50, 64), []
    for kept in ("e5m6", "fp8"):
        w = Weight(normal(64, 200))
        FP8Linear(w, make(cache_after_attention=kept), after_attention=True)(x.requires_grad_()).backward(dy)
        errors.append(relative(w.gradient(), dy.t().double() @ x.double()))
    assert errors[0] < errors[1] < 0.05


@pytest.mark.parametrize("recipe", ["fp8", "e5m6"])
def test_an_input_that_another_operator_keeps_is_saved_as_it_is_to_the_same_bits(recipe: str) -> None:
    x, dy, gradients = normal(50, 200), normal(50, 64), []
    for kept in (False, True):
        w = Weight(normal(64, 200))
        project = FP8Linear(w, make(cache_after_attention=recipe), after_attention=True)
        y = project(x.requires_grad_(), kept=kept)
        assert any(saved is x for saved in y.grad_fn.saved_tensors) == kept  # type: ignore[union-attr]
        y.backward(dy)
        gradients.append(w.gradient())
    assert torch.equal(*gradients)
