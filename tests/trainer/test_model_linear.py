"""Linears of a BF16 model: what is rounded to BF16, and what stays FP32."""

from __future__ import annotations

import torch

from dryvine.trainer.model.linear import linear, linear_to_fp32
from dryvine.trainer.tensors.weight import Weight


def operands() -> tuple[torch.Tensor, Weight, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(40, n, generator=generator).bfloat16() for n in (64, 64))
    return x.requires_grad_(), Weight(w), torch.randn(40, 40, generator=generator)


def test_nothing_of_the_gates_logits_is_rounded_to_bf16() -> None:
    x, weight, dy = operands()
    y = linear_to_fp32(x, weight)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
    y.backward(dy)
    assert x.grad is not None
    assert torch.equal(x.grad, (dy @ weight.float()).bfloat16())
    torch.testing.assert_close(weight.gradient().double(), dy.t().double() @ x.double(), rtol=1e-5, atol=1e-5)


def test_weight_gradients_of_a_bf16_model_add_up_in_fp32() -> None:
    """A thousandth, which BF16 would lose beside 1."""
    weight = Weight(torch.ones(1, 1).bfloat16())
    for dy in (1.0, 2.0**-10, 2.0**-10):
        linear(torch.ones(1, 1).bfloat16().requires_grad_(), weight).backward(torch.full((1, 1), dy).bfloat16())
    assert weight.gradient().dtype == torch.float32
    assert float(weight.gradient()) == 1 + 2.0**-9
