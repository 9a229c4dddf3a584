"""What only a GPU runs: BF16 grouped products, FP32 sums of BF16 products, unpadded attention. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from dryvine.parallel.wgrad import WGrad
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.layers import Weight, add_product, grouped_product, linear_to_fp32
from dryvine.trainer.model.shape import Shape
from tests.helpers_model import filled, random_tokens, tiny, train, whole

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def shape(*recompute: str) -> Shape:
    return tiny(
        layers=2, hidden=256, ffn=512, expert_ffn=128, q_lora=128, kv_lora=64, nope_dim=64, rope_dim=32, v_dim=64,
        routed=16, mtp_depth=1, vocab=512, init_std=0.02, recompute=recompute,
    )  # fmt: skip


def on_gpu(source: Model, shape: Shape, dtype: torch.dtype) -> Model:
    model = whole(shape, dtype=dtype, device="cuda")
    model.load({name: weight.detach() for name, weight in source.named_parameters()} | source.buffers)
    return model


def test_fp32_gradients_equal_the_cpus() -> None:
    cpu, tokens = filled(shape()), random_tokens(shape(), 2, 128)
    gpu = on_gpu(cpu, shape(), torch.float32)
    losses, theirs = train(gpu, tokens.cuda()), train(cpu, tokens)
    for name, loss in theirs.items():
        torch.testing.assert_close(losses[name].cpu(), loss, rtol=1e-5, atol=1e-6)
    parameters = dict(gpu.named_parameters())
    for name, weight in cpu.named_parameters():
        difference = (parameters[name].gradient().cpu() - weight.gradient()).norm() / weight.gradient().norm()
        assert difference < 1e-5, name


def test_bf16_loss_is_near_and_recompute_keeps_the_bits() -> None:
    cpu, tokens = filled(shape()), random_tokens(shape(), 2, 128)
    plain, saving = (on_gpu(cpu, shape(*ways), torch.bfloat16) for ways in ((), ("norm", "mla_up", "swiglu")))
    losses = train(plain, tokens.cuda())
    assert train(saving, tokens.cuda()) == losses
    torch.testing.assert_close(losses["loss"].cpu(), train(cpu, tokens)["loss"], rtol=1e-3, atol=0)
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert torch.equal(a.gradient(), b.gradient()), name


@pytest.mark.parametrize("counts", [[3, 0, 100, 17, 1, 512, 0, 60], [0] * 8, [0, 0, 5, 0, 0, 0, 0, 0]])
def test_grouped_products_take_any_counts(counts: list[int]) -> None:
    rows = torch.randn(sum(counts), 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(8, 64, 128, device="cuda", dtype=torch.bfloat16)
    y = grouped_product(rows, weight, counts)
    torch.testing.assert_close(y, torch.cat([x @ w.t() for x, w in zip(rows.split(counts), weight, strict=True)]))
    dx = grouped_product(y, weight.transpose(1, 2), counts)
    torch.testing.assert_close(dx, torch.cat([d @ w for d, w in zip(y.split(counts), weight, strict=True)]))


def test_products_are_summed_in_fp32() -> None:
    dy, x = (torch.randn(4096, n, device="cuda", dtype=torch.bfloat16) for n in (64, 96))
    total = torch.full((64, 96), 0.125, device="cuda")
    add_product(total, dy, x)
    torch.testing.assert_close(total, 0.125 + dy.float().t() @ x.float(), rtol=1e-5, atol=1e-3)


def test_the_gates_product_keeps_what_fp32_operands_would_give() -> None:
    x = torch.randn(512, 7168, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(512, 256, device="cuda") * 1e-3
    plain = torch.randn(256, 7168, device="cuda", dtype=torch.bfloat16) * 0.02
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        weight, leaf = Weight(plain.to(dtype)), x.to(dtype).requires_grad_()
        y = linear_to_fp32(leaf, weight, WGrad())
        y.backward(dy)
        found.append((y.detach(), leaf.grad, weight.gradient()))
    (y, dx, dw), (true_y, true_dx, true_dw) = found
    torch.testing.assert_close(y, true_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, true_dx.bfloat16(), rtol=2**-7, atol=1e-6)  # one unit in the last place of BF16
    assert (dw - true_dw).norm() / true_dw.norm() < 1e-5
