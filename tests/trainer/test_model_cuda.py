"""What only a GPU runs: BF16 grouped products and weight gradients, FP32 sums of BF16 products, unpadded attention,
kernels for heads and SwiGLU. Skipped without one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dryvine.comm.dispatch.routing import upload
from dryvine.trainer.model import gate, qkv, swiglu
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.grouped import add_grouped_product, grouped_linear, grouped_product
from dryvine.trainer.model.linear import add_product, linear_to_fp32
from dryvine.trainer.model.norm import norm_backward
from dryvine.trainer.model.rope import Rope
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.tensors import groups as expert_groups
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.weight import Weight
from tests.support import gate as helpers_gate
from tests.support import norm as helpers_norm
from tests.support.gate import GATES, case, gate_of, tied
from tests.support.model import filled, random_tokens, tiny, train, whole

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextmanager
def waits(mode: str) -> Iterator[None]:
    """What happens when the host waits for the device: "default" or "error"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    for way in (qkv.assemble.reference, qkv.assemble):
        by_head = [t.unflatten(1, (many, -1)) for t in (inputs[0].clone(), inputs[1])]
        made = way(*by_head, inputs[2], table)
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
    groups = ExpertGroups.of(counts, rows)
    y = grouped_product(rows, weight, groups)
    torch.testing.assert_close(y, torch.cat([x @ w.t() for x, w in zip(rows.split(counts), weight, strict=True)]))
    dx = grouped_product(y, weight.transpose(1, 2), groups)
    torch.testing.assert_close(dx, torch.cat([d @ w for d, w in zip(y.split(counts), weight, strict=True)]))


RAGGED = (1, 0, 63, 64, 65, 129, 0, 5000, 7)


def grouped_operands(outputs: int, inputs: int) -> tuple[ExpertGroups, torch.Tensor, torch.Tensor]:
    groups = ExpertGroups(RAGGED, torch.device("cuda"))
    dy, x = (torch.randn(groups.rows, size, device="cuda", dtype=torch.bfloat16) for size in (outputs, inputs))
    return groups, dy, x


@pytest.mark.parametrize(("outputs", "inputs"), [(128, 256), (8, 8), (200, 520), (1408, 1024), (100, 300)])
def test_weight_gradients_of_experts_are_fp32_sums(outputs: int, inputs: int) -> None:
    """Of any number of rows, in whole tiles or not. (100, 300) is not for TMA and takes a product an expert."""
    groups, dy, x = grouped_operands(outputs, inputs)
    held = torch.randn(len(RAGGED), outputs, inputs, device="cuda")
    total = held.clone()
    add_grouped_product(total, dy, x, groups)
    for one, before, d, r in zip(total, held, dy.split(RAGGED), x.split(RAGGED), strict=True):
        exact = before.double() + d.double().t() @ r.double()
        terms = before.double().abs() + d.double().abs().t() @ r.double().abs()
        # A tensor core cuts its FP32 sum after every 16 products.
        assert ((one.double() - exact).abs() <= (len(d) / 16 + 4) * 2**-22 * terms).all(), len(d)
        assert len(d) or torch.equal(one, before)


def test_weight_gradients_of_experts_have_the_same_bits_every_time() -> None:
    groups, dy, x = grouped_operands(520, 1032)
    found = []
    for _ in range(20):
        total = torch.ones(len(RAGGED), 520, 1032, device="cuda")
        add_grouped_product(total, dy, x, groups)
        found.append(total)
    assert all(torch.equal(found[0], total) for total in found[1:])


def test_rows_of_other_experts_do_not_leak_into_weight_gradients() -> None:
    groups, dy, x = grouped_operands(136, 264)
    owner_R1 = torch.arange(len(RAGGED)).repeat_interleave(torch.tensor(RAGGED)).unsqueeze(1).cuda()
    found = []
    for ours in (owner_R1 >= 0, *(owner_R1 == expert for expert in range(len(RAGGED)))):
        total = torch.zeros(len(RAGGED), 136, 264, device="cuda")
        add_grouped_product(total, torch.where(ours, dy, 3e38), torch.where(ours, x, 3e38), groups)
        found.append(total)
    whole, *alone = found
    assert whole.isfinite().all()
    for expert, total in enumerate(alone):
        assert torch.equal(total[expert], whole[expert]), RAGGED[expert]


def test_experts_send_their_counts_once_and_the_host_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(expert_groups, "upload", lambda numbers, *to: (sent.append(numbers), upload(numbers, *to))[1])
    up, down = (Weight(torch.randn(3, *size, device="cuda").bfloat16()) for size in ((64, 128), (128, 64)))
    x, dy = (torch.randn(200, 128, device="cuda").bfloat16().requires_grad_(leaf) for leaf in (True, False))
    for mode in ("default", "error"):  # the first compiles
        groups = ExpertGroups.of((120, 0, 80), x)
        with waits(mode):
            grouped_linear(grouped_linear(x, up, groups), down, groups).backward(dy)
    assert sent == [[120, 0, 80]] * 2


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
        y = linear_to_fp32(leaf, weight)
        y.backward(dy)
        found.append((y.detach(), leaf.grad, weight.gradient()))
    (y, dx, dw), (true_y, true_dx, true_dw) = found
    cut = 7168 / 16 * 2**-24  # a tensor core cuts its FP32 sum after every 16 products
    assert (y - true_y).norm() / true_y.norm() < cut
    assert (dx.float() - true_dx).norm() / true_dx.norm() < 2**-8  # rounded once
    assert (dw - true_dw).norm() / true_dw.norm() < 1e-5


@pytest.mark.parametrize(("rows", "width"), [(4096, 2048), (4099, 512), *helpers_norm.SIZES])
@pytest.mark.parametrize("dtype", helpers_norm.DTYPES)
@pytest.mark.parametrize("residual", [True, False])
def test_both_gradients_of_a_norm_are_near_fp64_and_the_same_twice(
    rows: int, width: int, dtype: torch.dtype, residual: bool
) -> None:
    given = helpers_norm.case(rows, width, dtype, "cuda", residual)
    found, again = norm_backward(*given), norm_backward(*given)
    helpers_norm.assert_near(found, given)
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1], again[1])


@pytest.mark.parametrize("name", GATES)
def test_a_gate_chooses_counts_and_weighs_as_in_fp64(name: str) -> None:
    """Twice to the same bits, and without a wait of the host."""
    shape, sequences, length = gate_of(name), 3, 301
    logits, bias, dweights, dloss, (true_weights, true_dlogits, *true_loss), true_experts = case(
        shape, sequences, length
    )
    leaf, bias = logits.cuda().requires_grad_(), bias.cuda()
    given = [dweights.cuda(), *([torch.tensor(dloss, device="cuda")] if true_loss else [])]
    load = torch.zeros(shape.routed, dtype=torch.int64, device="cuda")

    def both_ways() -> list[torch.Tensor]:
        weights, experts, loss = gate.route(leaf, bias, shape, sequences, load)
        outputs = [weights] if loss is None else [weights, loss]
        return [experts, *outputs, *torch.autograd.grad(outputs, leaf, given)]

    found = both_ways()
    with waits("error"):
        again = both_ways()
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    experts, weights, *loss, dlogits = (tensor.detach().cpu() for tensor in found)
    assert torch.equal(experts, true_experts)
    assert torch.equal(load.cpu(), 2 * true_experts.flatten().bincount(minlength=shape.routed))
    torch.testing.assert_close(weights.double(), true_weights, rtol=2e-6, atol=0)
    torch.testing.assert_close([one.double() for one in loss], true_loss, rtol=2e-6, atol=0)
    helpers_gate.near(dlogits, true_dlogits, dweights, 4e-6)


@pytest.mark.parametrize("name", ["V3", "V2-Lite", "nothing a power of two"])
def test_of_equal_experts_and_groups_a_gate_takes_the_first(name: str) -> None:
    shape = gate_of(name)
    logits, truth = tied(shape, 1000)
    _, experts, _ = gate.route(logits.cuda(), torch.zeros(shape.routed, device="cuda"), shape, 1)
    assert torch.equal(experts.cpu(), truth)


@pytest.mark.parametrize("name", GATES)
def test_logits_that_are_no_numbers_choose_different_experts(name: str) -> None:
    """Or a step that could be skipped would end in the dispatcher, or write where no row is."""
    shape = gate_of(name)
    logits = torch.randn(64, shape.routed, device="cuda")
    for row, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits[row], logits[row + 3, 0], logits[row + 6, ::2] = bad, bad, bad
    load = torch.zeros(shape.routed, dtype=torch.int64, device="cuda")
    _, experts, _ = gate.route(logits, torch.zeros(shape.routed, device="cuda"), shape, 1, load)
    assert all(len({*row}) == shape.top_k and {*row} <= {*range(shape.routed)} for row in experts.tolist())
    assert torch.equal(load.cpu(), experts.cpu().flatten().bincount(minlength=shape.routed))


def test_a_gate_of_no_tokens() -> None:
    shape = gate_of("V3")
    leaf = torch.empty(0, shape.routed, device="cuda", requires_grad=True)
    weights, experts, _ = gate.route(leaf, torch.zeros(shape.routed, device="cuda"), shape, 1)
    (dlogits,) = torch.autograd.grad(weights.sum(), leaf)
    assert (weights.shape, experts.shape, dlogits.shape) == ((0, 8), (0, 8), (0, shape.routed))
