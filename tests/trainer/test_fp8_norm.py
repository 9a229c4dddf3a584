"""RMSNorm that leaves the cast of its output to the Linears behind it: the same bits, fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dryvine.trainer.fp8 import fused
from dryvine.trainer.fp8.casts import quantize_rows
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.model.norm import Normed, RMSNorm, normalise
from tests.support.model import in_fp8, random_tokens, tiny, train

Result = tuple[dict[str, Tensor], dict[str, Tensor], list[Any]]


def step(**changes: Any) -> Result:
    """Losses, gradients and the guard's counts of a training step of a whole model."""
    recipe = {"activation_tile": changes.pop("tile")} if "tile" in changes else {}
    shape = tiny(hidden=256, mtp_depth=1, **changes)
    model, fp8 = in_fp8(shape, **recipe)
    fp8.guard.on = True
    losses = train(model, random_tokens(shape))
    grads = {name: weight.gradient() for name, weight in model.named_parameters()}
    return losses, grads, sorted(fp8.guard.take(model.named_parameters()))


def same(one: Result, other: Result) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert [name for name, grad in one[1].items() if not torch.equal(grad, other[1][name])] == []
    assert one[2] == other[2]


class Counter:
    """How often a function of an object was called."""

    def __init__(self, patch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        self.calls, original = 0, getattr(where, name)

        def counted(*args: Any) -> Any:
            self.calls += 1
            return original(*args)

        patch.setattr(where, name, counted)


def test_the_norms_cast_is_the_one_that_linears_would_make(monkeypatch: pytest.MonkeyPatch) -> None:
    casts = Counter(monkeypatch, FP8, "rows")
    handed_on = step()
    with_it = casts.calls
    beside = RMSNorm.beside

    def without(self: RMSNorm, x: Tensor) -> tuple[Tensor, Normed]:
        x, normed = beside(self, x)
        return x, normed._replace(rows=None)

    monkeypatch.setattr(RMSNorm, "beside", without)
    same(handed_on, step())
    # Of a dense layer: attention's (two Linears), q, kv and FFN; of three routed ones, MTP's included, the shared FFN.
    norms = 4 * (1 + 1 + 1 + 1)
    assert casts.calls - 2 * with_it >= norms
    assert with_it == 4 + 1, "left are attention's output in each layer, and MTP's projection of two norms"


@pytest.mark.parametrize("shared", [1, 0])
def test_recompute_changes_no_bit_and_casts_each_norm_once_more(monkeypatch: pytest.MonkeyPatch, shared: int) -> None:
    with_cast = Counter(monkeypatch, fused, "rmsnorm_rows")
    kept = step(shared=shared)
    casts, with_cast.calls = with_cast.calls, 0
    same(kept, step(shared=shared, recompute=("norm",)))
    # Where experts are not shared, the norm before them is cast for no Linear.
    assert casts == 4 * 4 - (0 if shared else 3)
    assert with_cast.calls == 2 * casts


def test_other_tiles_are_not_fused_and_are_cast_once_a_tensor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    casts, with_cast = Counter(monkeypatch, FP8, "rows"), Counter(monkeypatch, fused, "rmsnorm_rows")
    step(tile="tensor")
    assert with_cast.calls == 0
    # Norms of four layers, attention's output in each, MTP's projection, and rows that reach experts in BF16.
    assert casts.calls == 4 * 4 + 4 + 1 + 3


def test_norm_is_the_models_norm() -> None:
    """The FP8 model's norm sums in FP64: no nearer to the other than BF16's last bit, and no further."""
    x, weight = torch.randn(50, 384).bfloat16(), torch.rand(384).bfloat16()
    rows, ours, _ = fused.rmsnorm_rows(x, weight, 1e-6)
    theirs = torch.nn.functional.rms_norm(x.double(), (384,), weight.double(), 1e-6)
    torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=0)
    cast = quantize_rows(ours)
    assert torch.equal(rows.values.view(torch.uint8), cast.values.view(torch.uint8))
    assert torch.equal(rows.scales, cast.scales)


def with_cast(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return fused.rmsnorm_rows(x, weight, eps)[1:]


@pytest.mark.parametrize("norm", [with_cast, normalise])
def test_eps_is_added_to_the_mean_square(norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]) -> None:
    """Of rows whose mean square is eps, or far below it."""
    x = torch.tensor([[1e-3], [1e-6]]).expand(2, 128) * torch.tensor([1.0, -1.0]).repeat(64)
    normed, inverse = norm(x.contiguous(), torch.ones(128), 1e-6)
    torch.testing.assert_close(inverse.flatten(), torch.tensor([1e3 / 2**0.5, 1e3]), rtol=1e-6, atol=0)
    torch.testing.assert_close(normed.abs().amax(1), torch.tensor([0.5**0.5, 1e-3]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shared", [1, 0])
def test_recompute_of_whole_layers_changes_no_bit_in_fp8(shared: int) -> None:
    same(step(shared=shared), step(shared=shared, recompute=("layer",)))
