"""The backward of RMSNorm by its definition; of its kernel in spawned/model_interpreted.py and test_model_cuda.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dryvine.trainer.model import norm
from dryvine.trainer.model.norm import RMSNorm, norm_backward
from dryvine.trainer.tensors.weight import Weight
from tests.support import norm as helpers_norm
from tests.support.model import filled, random_tokens, tiny, train


@pytest.mark.parametrize(("rows", "width"), helpers_norm.SIZES)
@pytest.mark.parametrize("dtype", helpers_norm.DTYPES)
@pytest.mark.parametrize("residual", [True, False])
def test_both_gradients_equal_plain_autograd(rows: int, width: int, dtype: torch.dtype, residual: bool) -> None:
    given = helpers_norm.case(rows, width, dtype, residual=residual)
    helpers_norm.assert_near(norm_backward(*given), given)


def test_the_residual_is_x_itself_and_its_gradient_is_rounded_with_the_norms() -> None:
    dy, x, _, weight, given = helpers_norm.case(5, 64, torch.bfloat16)
    leaf, module = x.clone().requires_grad_(), RMSNorm(Weight(weight), helpers_norm.EPS)
    residual, normed = module.beside(leaf)
    assert residual.data_ptr() == leaf.data_ptr()
    torch.autograd.backward((residual, normed.x), (given, dy))
    assert leaf.grad is not None
    inverse = torch.rsqrt(leaf.detach().float().square().mean(-1, keepdim=True) + helpers_norm.EPS)
    helpers_norm.assert_near((leaf.grad, module.weight.gradient()), (dy, leaf.detach(), inverse, weight, given))


@pytest.mark.parametrize("recompute", [(), ("norm", "mla_up", "swiglu"), ("layer",)])
@pytest.mark.parametrize("shared", [1, 0])
def test_gradients_of_residuals_meet_those_of_their_norms(
    shared: int, recompute: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two norms of each layer, MTP's too; not of those of latents, of MTP's input and of heads."""
    shape = tiny(layers=2, first_dense=1, mtp_depth=1, shared=shared, recompute=recompute)
    met: list[bool] = []

    def noting(*given: Any) -> Any:
        met.append(given[4] is not None)
        return norm_backward(*given)

    monkeypatch.setattr(norm, "norm_backward", noting)
    train(filled(shape), random_tokens(shape))
    layers = shape.layers + shape.mtp_depth
    assert (met.count(True), met.count(False)) == (2 * layers, 2 * layers + 2 + 2)
