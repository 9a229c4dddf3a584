"""What only a GPU runs: BF16 grouped products, FP32 sums of BF16 products, unpadded attention, kernels for heads and
SwiGLU. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from dryvine.parallel.wgrad import WGrad
from dryvine.trainer.model import heads, swiglu
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.layers import Weight, add_product, grouped_product, linear_to_fp32
from dryvine.trainer.model.rope import Rope
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


def test_queries_straight_from_the_hidden_state_are_remade_too() -> None:
    """Queries are rotated in place, and here they are the latent that recompute starts from."""
    losses, gradients = [], []
    for ways in ((), ("mla_up",)):
        straight = Shape(**(shape(*ways).model_dump() | {"q_lora": None}))
        model = on_gpu(filled(straight), straight, torch.bfloat16)
        losses.append(train(model, random_tokens(straight, 2, 128).cuda()))
        gradients.append({name: weight.gradient() for name, weight in model.named_parameters()})
    assert losses[0] == losses[1]
    assert not [name for name, gradient in gradients[0].items() if not torch.equal(gradient, gradients[1][name])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(2, 65, 128, 128, 64, 128), (3, 7, 5, 24, 12, 40)])
def test_heads_have_the_bits_of_torch(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    sequences, length, many, nope, rope, v = sizes
    n, widths = sequences * length, (many * (nope + rope), many * (nope + v), 10 + rope)
    table = Rope(tiny(rope_dim=rope)).table(length, torch.device("cuda"))
    q, kv, latent = (torch.randn(n, width, device="cuda").to(dtype) for width in widths)
    inputs = [t.requires_grad_() for t in (q, kv, latent[:, 10:])]
    given = [torch.randn(sequences, many, length, w, device="cuda").to(dtype) for w in (nope + rope, nope + rope, v)]
    found = []
    for way in (heads.plain, heads.assemble):
        made = way(inputs[0].clone(), *inputs[1:], table, sequences, many)
        outputs = [*made[:2], made[2][..., :v]]  # values may be padded
        found.append([*outputs, *torch.autograd.grad(outputs, inputs, given)])
    for theirs, ours in zip(*(each[:5] for each in found), strict=True):
        assert torch.equal(ours, theirs)
    a, b = given[1][..., nope:].double().sum(1).flatten(0, 1).chunk(2, -1)
    cos, sin = (t.squeeze(1).double().repeat(sequences, 1) for t in table)
    exact = torch.stack((a * cos + b * sin, b * cos - a * sin), -1).flatten(1)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-24
    torch.testing.assert_close(found[1][5].double(), exact, rtol=1.001 * rounding, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1000, 2048), (7, 5000), (0, 128)])
def test_swiglu_is_rounded_once(rows: int, width: int, weighted: bool, dtype: torch.dtype) -> None:
    h, dy = (torch.randn(rows, w, device="cuda").mul(3).to(dtype) for w in (2 * width, width))
    leaves = [h.requires_grad_(), *([torch.randn(rows, device="cuda").requires_grad_()] if weighted else [])]
    y = swiglu.swiglu(*leaves)
    found = [y, *torch.autograd.grad(y, leaves, dy, retain_graph=True)]
    for one, again in zip(found[1:], torch.autograd.grad(y, leaves, dy), strict=True):
        assert torch.equal(one, again)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    gate, up = wide[0].chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up * (wide[1].unsqueeze(-1) if weighted else 1.0)
    rounding = 1.001 * 2**-8 if dtype == torch.bfloat16 else 1e-5
    truth = [exact, *torch.autograd.grad(exact, wide, dy.double())]
    for ours, true, near in zip(found, truth, (rounding, rounding, 1e-5), strict=False):
        torch.testing.assert_close(ours.double(), true, rtol=near, atol=1e-3 if near == 1e-5 else 1e-5)


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
        weight, leaf = Weight(plain.to(dtype)), x.to(dtype, copy=True).requires_grad_()
        y = linear_to_fp32(leaf, weight, WGrad())
        y.backward(dy)
        found.append((y.detach(), leaf.grad, weight.gradient()))
    (y, dx, dw), (true_y, true_dx, true_dw) = found
    cut = 7168 / 16 * 2**-24  # a tensor core cuts its FP32 sum after every 16 products
    assert (y - true_y).norm() / true_y.norm() < cut
    assert (dx.float() - true_dx).norm() / true_dx.norm() < 2**-8  # rounded once
    assert (dw - true_dw).norm() / true_dw.norm() < 1e-5
