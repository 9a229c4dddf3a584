"""The model's kernels under Triton's CPU interpreter, against their definitions in torch. Run by test_model_kernels.py.

Its own process: TRITON_INTERPRET must be set before triton is first imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.support.census import Census
from dryvine.trainer.adam import Operands, Update
from dryvine.trainer.adam_kernel import BLOCK, KernelAdamW
from dryvine.trainer.fp8.recipe import preset
from dryvine.trainer.model import memory
from dryvine.trainer.model.gate import route
from dryvine.trainer.model.kernels import loss as loss_kernels
from dryvine.trainer.model.loss import log_sum_exp, logits_to_gradient
from dryvine.trainer.model.norm import norm_backward
from dryvine.trainer.model.qkv import assemble
from dryvine.trainer.model.recompute import through
from dryvine.trainer.model.rope import Rope
from dryvine.trainer.model.swiglu import swiglu_backward, swiglu_forward
from dryvine.trainer.optim import MOMENTS
from dryvine.trainer.ramps import OptimConfig
from tests.support import norm as helpers_norm
from tests.support.adamw import HALF_ULP, fp64_adamw
from tests.support.gate import GATES, case, clear, gate_of, near, tied
from tests.support.interpreter import right_casts
from tests.support.model import filled, random_tokens, tiny, train


@pytest.fixture(autouse=True, scope="module")
def _right_casts() -> Iterator[None]:
    with right_casts():
        yield


class Size(NamedTuple):
    sequences: int
    length: int
    heads: int
    nope: int
    rope: int
    v: int


SIZES = [
    Size(1, 5, 3, 8, 6, 12),  # nothing a power of two
    Size(3, 4, 3, 12, 4, 8),
    Size(2, 2, 40, 16, 8, 16),  # more heads than a program takes at a time
    Size(2, 3, 1, 128, 64, 128),
]


def latents(size: Size, dtype: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """q, kv, the rope key as a slice of wider rows, all asking for gradients; and the table."""
    generator = torch.Generator().manual_seed(3)
    n, widths = size.sequences * size.length, (size.heads * (size.nope + size.rope), size.heads * (size.nope + size.v))
    q, kv, latent = (torch.randn(n, w, generator=generator).to(dtype) for w in (*widths, 10 + size.rope))
    table = Rope(tiny(rope_dim=size.rope)).table(size.length, torch.device("cpu"))
    return [t.requires_grad_() for t in (q, kv, latent[:, 10:])], table


def same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    assert torch.equal(one, other), f"{int((one != other).sum())} of {one.numel()} differ"


def by_head(inputs: list[Tensor], size: Size) -> tuple[Tensor, Tensor, Tensor]:
    q, kv, k_rope = inputs
    return q.unflatten(1, (size.heads, -1)), kv.unflatten(1, (size.heads, -1)), k_rope


def defined(inputs: list[Tensor], table: Any, size: Size) -> list[Tensor]:
    """The definition, without the padding of values."""
    q, k, v = assemble.reference(*by_head(inputs, size), table)
    return [q, k, v[..., : size.v]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_heads_have_the_definitions_bits(size: Size, dtype: torch.dtype) -> None:
    inputs, table = latents(size, dtype)
    theirs = defined(inputs, table, size)
    q, kv, _ = inputs
    place = q.data_ptr()
    ours = assemble.kernel(*by_head(inputs, size), table)
    for one, other in zip(ours, theirs, strict=True):
        same(one, other)
    assert ours[0].data_ptr() == place, "rotated in place"
    assert ours[2].untyped_storage().data_ptr() == kv.untyped_storage().data_ptr(), "values are a view"


def gradients(inputs: list[Tensor], outputs: Any, given: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, inputs, given))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_heads(size: Size, dtype: torch.dtype, dense: bool) -> None:
    """Of q and kv to the bit, since each is rounded once in either; of the rope key as good as one rounding allows."""
    inputs, table = latents(size, dtype)
    outputs = defined(inputs, table, size)
    generator = torch.Generator().manual_seed(4)
    given = [torch.randn(t.shape, generator=generator).to(dtype) for t in outputs]
    if not dense:  # as a core may give them: in the order of its inputs, or with another innermost dimension
        turned = given[1].transpose(2, 3).contiguous().transpose(2, 3)
        given = [given[0].transpose(1, 2).contiguous().transpose(1, 2), turned, given[2]]
    kept = [t.clone() for t in given]
    dq, dkv, dk_rope = gradients(inputs, assemble.kernel(*by_head(inputs, size), table), given)
    for one, other in zip(given, kept, strict=True):
        same(one, other)
    inputs, _ = latents(size, dtype)
    true_dq, true_dkv, _ = gradients(inputs, defined(inputs, table, size), given)
    same(dq, true_dq)
    same(dkv, true_dkv)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    k_grad, half = given[1].double(), size.rope // 2
    a, b = k_grad[..., size.nope :].sum(1).split(half, -1)
    cos, sin = (t.squeeze(1).double() for t in table)
    exact = torch.stack((a * cos + b * sin, b * cos - a * sin), -1).view(wide[2].shape)
    one_rounding = 2**-8 if dtype == torch.bfloat16 else 2**-24
    torch.testing.assert_close(dk_rope.double(), exact, rtol=1.001 * one_rounding, atol=1e-5)


class _Slice(torch.autograd.Function):
    """A Linear whose output is a part of what it made, as padded FP8 products give it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.cat((x, x))[: len(x)]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def test_heads_between_slices_and_a_core_that_drops_them() -> None:
    """The way through a layer: products give slices, and what the core saves is made again in the backward."""
    size, found = SIZES[1], []
    for again in (False, True, None):
        inputs, table = latents(size, torch.float32)
        way = assemble.reference if again is None else assemble.kernel

        def make(way: Any = way, inputs: list[Tensor] = inputs, table: Any = table) -> Any:
            q, kv, k_rope = inputs
            q, k, v = way(*by_head([_Slice.apply(q), _Slice.apply(kv), k_rope], size), table)
            return q, k, v[..., : size.v]

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.transpose(2, 3), -1) @ v

        out = through(make, core, bool(again))
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for kept, remade, plain in zip(*found, strict=True):
        same(kept, remade)
        torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q_lora", [20, None])
def test_a_model_of_these_kernels(q_lora: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute keeps the bits, also where the queries rotated in place are what it starts from; and the whole is what
    torch makes of it."""
    found = []
    for ways, kernels in (((), False), ((), True), (("norm", "mla_up", "swiglu"), True)):
        if kernels:
            for function in (assemble, swiglu_forward, swiglu_backward, route, norm_backward):
                monkeypatch.setattr(function, "reference", function.kernel)
        shape = tiny(layers=1, first_dense=0, q_lora=q_lora, v_dim=12, recompute=ways)
        model = filled(shape)
        losses = train(model, random_tokens(shape, 2, 3))
        found.append(losses | {name: weight.gradient() for name, weight in model.named_parameters()})
    plain, kept, remade = found
    assert not [name for name, tensor in kept.items() if not torch.equal(tensor, remade[name])]
    for name, tensor in plain.items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_backward_that_saved_q_refuses_to_read_it_rotated() -> None:
    inputs, table = latents(SIZES[0], torch.float32)
    q = inputs[0] * 1.0
    square = q.square().sum()
    assemble.kernel(*by_head([q, *inputs[1:]], SIZES[0]), table)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(5, 24), (2, 5000), (3, 2048), (0, 8)])
def test_swiglu(rows: int, width: int, weighted: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one rounding of exact results, and as near to them as the definition is."""
    generator = torch.Generator().manual_seed(5)
    h, dy = (torch.randn(rows, w, generator=generator).mul(3).to(dtype) for w in (2 * width, width))
    weights = torch.randn(rows, generator=generator) if weighted else None
    y, (dh, dweights) = swiglu_forward.kernel(h, weights), swiglu_backward.kernel(dy, h, weights)

    wide = [t.double().requires_grad_() for t in (h, *([] if weights is None else [weights]))]
    gate, up = wide[0].chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up * (wide[1].unsqueeze(-1) if weighted else 1.0)
    rounding = 1.001 * 2**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=1e-9)
    true_dh, *true_dweights = torch.autograd.grad(exact, wide, dy.double())
    torch.testing.assert_close(dh.double(), true_dh, rtol=rounding, atol=1e-5)
    assert (dweights is None) == (not weighted)
    if dweights is not None:
        torch.testing.assert_close(dweights.double(), true_dweights[0], rtol=1e-5, atol=1e-4)
    plain = swiglu_forward.reference(h, weights), *swiglu_backward.reference(dy, h, weights)
    for ours, theirs in zip((y, dh, dweights), plain, strict=True):
        assert (None if ours is None else (ours.shape, ours.dtype)) == (
            None if theirs is None else (theirs.shape, theirs.dtype)
        )


def test_swiglu_of_extremes() -> None:
    edge = torch.tensor([0.0, -0.0, 1e30, -1e30, 90.0, -90.0, torch.inf, -torch.inf, torch.nan])
    h, dy = torch.cat((edge, torch.ones(9))).unsqueeze(0), torch.ones(1, 9)
    torch.testing.assert_close(swiglu_forward.kernel(h, None), swiglu_forward.reference(h, None), equal_nan=True)
    torch.testing.assert_close(
        swiglu_backward.kernel(dy, h, None)[0], swiglu_backward.reference(dy, h, None)[0], equal_nan=True
    )


@pytest.mark.parametrize("held", [torch.nan, torch.inf, 3e38])
def test_swiglu_of_a_row_of_weight_zero_is_zero_whatever_it_holds(held: float) -> None:
    h, weights = torch.full((3, 16), held), torch.tensor([0.0, 1.0, -0.0])
    y = swiglu_forward.kernel(h, weights)
    assert y[[0, 2]].eq(0).all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize(("rows", "width"), helpers_norm.SIZES)
@pytest.mark.parametrize("dtype", helpers_norm.DTYPES)
@pytest.mark.parametrize("residual", [True, False])
def test_both_gradients_of_a_norm(rows: int, width: int, dtype: torch.dtype, residual: bool) -> None:
    given = helpers_norm.case(rows, width, dtype, residual=residual)
    helpers_norm.assert_near(norm_backward.kernel(*given), given)


@pytest.mark.parametrize(("rows", "width"), [(3, 7), (5, loss_kernels.BLOCK + 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient(rows: int, width: int, dtype: torch.dtype) -> None:
    """Logits from near nothing to where e^x overflows FP32, and a row of -inf but one."""
    generator = torch.Generator().manual_seed(6)
    logits = (torch.randn(rows, width, generator=generator) * torch.logspace(-2, 2.5, rows).unsqueeze(1)).to(dtype)
    logits[0, 1:] = float("-inf")
    targets = torch.arange(rows) * 2 % width
    ours, theirs = log_sum_exp.kernel(logits), log_sum_exp.reference(logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    found, truth, scales = logits.clone(), logits.clone(), torch.linspace(0, 3, rows)
    logits_to_gradient.kernel(found, targets, theirs, scales)
    logits_to_gradient.reference(truth, targets, theirs, scales)
    torch.testing.assert_close(found, truth, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("moments", "betas", "decay", "size"),
    [("fp32", (0.9, 0.999), 0.1, 5), ("fp32", (0.0, 0.95), 0.0, BLOCK), ("bf16", (0.9, 0.95), 0.1, BLOCK + 3)],
)
def test_adamw_in_one_pass_is_fp64_to_rounding(
    moments: str, betas: tuple[float, float], decay: float, size: int
) -> None:
    """The clip included. Weights are the new master, rounded; what lies behind the shard is not touched."""
    config = OptimConfig(moments=moments, betas=betas)  # type: ignore[arg-type]
    torch.manual_seed(0)
    memory = [torch.randn(size + 9) for _ in range(2)] + [torch.zeros(size + 9, dtype=MOMENTS[moments]) for _ in "mv"]
    memory.append(torch.zeros(size + 9, dtype=torch.bfloat16))
    behind = [tensor[size:].clone() for tensor in memory]
    on, weights = Operands(*(tensor[:size] for tensor in memory[:4]), matrices=size), memory[4][:size]
    for updates in range(3):
        on.grad.normal_()
        before = {"master": on.master.clone(), "exp_avg": on.exp_avg.clone(), "exp_avg_sq": on.exp_avg_sq.clone()}
        before["step"] = torch.tensor(float(updates))
        want = fp64_adamw(before, on.grad.double() * 0.25, 1e-2, decay, config)
        KernelAdamW(config)(on, before["step"], Update(1e-2, 0.25, decay), weights if updates else None)
        torch.testing.assert_close(on.master.double(), want["master"], rtol=2e-6, atol=2e-8)
        for field in ("exp_avg", "exp_avg_sq"):
            bound = HALF_ULP[moments] * want[field].abs() + 2.0**-22 * 0.25
            assert ((getattr(on, field).double() - want[field]).abs() <= bound).all(), field
        assert weights.equal(on.master.bfloat16() if updates else torch.zeros_like(weights))
    assert all(tensor[size:].equal(old) for tensor, old in zip(memory, behind, strict=True))


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("matrices", [0, 16, BLOCK - 16, BLOCK, BLOCK + 48, BLOCK + 64])
def test_matrices_decay_and_vectors_do_not_with_the_bits_of_a_launch_for_each(moments: str, matrices: int) -> None:
    config, size, step = OptimConfig(moments=moments), BLOCK + 64, torch.tensor(3.0)  # type: ignore[arg-type]
    torch.manual_seed(0)
    tensors = [torch.randn(size), torch.randn(size), *(torch.rand(size).to(MOMENTS[moments]) for _ in "mv")]
    whole, apart = (Operands(*(tensor.clone() for tensor in tensors), matrices=matrices) for _ in range(2))
    weights, each = (torch.zeros(size, dtype=torch.bfloat16) for _ in range(2))
    KernelAdamW(config)(whole, step, Update(1e-2, 0.25, 0.5), weights)
    for part, decay in ((slice(0, matrices), 0.5), (slice(matrices, size), 0.0)):
        # All of a part decays by the same.
        on = apart.part(part)._replace(matrices=part.stop - part.start)
        KernelAdamW(config)(on, step, Update(1e-2, 0.25, decay), each[part])
    assert all(one.equal(two) for one, two in zip(whole.tensors, apart.tensors, strict=True))
    assert weights.equal(each)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_chooses_counts_and_weighs_as_defined(name: str) -> None:
    """Sequences end within a program's tile."""
    shape, sequences, length = gate_of(name), 3, 7
    logits, bias, dweights, dloss, (true_weights, true_dlogits, *true_loss), true_experts = case(
        shape, sequences, length
    )
    leaf, load = logits.requires_grad_(), torch.arange(shape.routed)
    weights, experts, loss = route.kernel(leaf, bias, shape, sequences, load)
    same(experts, true_experts)
    assert torch.equal(load - torch.arange(shape.routed), true_experts.flatten().bincount(minlength=shape.routed))
    torch.testing.assert_close(weights.double(), true_weights, rtol=1e-6, atol=0)
    assert (loss is None) == (shape.balance_alpha == 0)
    if loss is not None:
        torch.testing.assert_close(loss.double(), true_loss[0], rtol=1e-6, atol=0)
    outputs, given = ([weights], [dweights]) if loss is None else ([weights, loss], [dweights, torch.tensor(dloss)])
    (dlogits,) = torch.autograd.grad(outputs, leaf, given, retain_graph=True)
    near(dlogits, true_dlogits, dweights)
    if loss is not None:  # the loss's gradient alone, and the weights' alone
        parts = [torch.autograd.grad(outputs[i], leaf, given[i], retain_graph=True)[0] for i in range(2)]
        near(parts[0] + parts[1], true_dlogits, dweights)


@pytest.mark.parametrize("name", ["V3", "V2-Lite", "nothing a power of two"])
def test_of_equal_experts_and_groups_the_first_is_taken(name: str) -> None:
    shape = gate_of(name)
    logits, truth = tied(shape, 30)
    same(route.kernel(logits, torch.zeros(shape.routed), shape, 1, None)[1], truth)


@pytest.mark.parametrize("name", ["V3", "V2", "nothing a power of two", "the same without balance loss"])
@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_still_choose_different_experts(name: str, bad: float) -> None:
    """Or a step that could be skipped would end in the dispatcher, or write where no row is."""
    shape = gate_of(name)
    logits, bias = clear(shape, 1, 6)
    logits[0], logits[1, 1], logits[2, ::2] = bad, bad, bad
    load = torch.zeros(shape.routed, dtype=torch.int64)
    weights, experts, _ = route.kernel(logits, bias, shape, 1, load)
    assert all(len({*row}) == shape.top_k and {*row} <= {*range(shape.routed)} for row in experts.tolist())
    assert torch.equal(load, experts.flatten().bincount(minlength=shape.routed))
    theirs, chosen, _ = route.reference(logits, bias, shape, 1, None)
    same(experts[3:], chosen[3:])
    assert torch.equal(weights.isnan().any(1), theirs.isnan().any(1))


def test_a_gate_of_no_tokens() -> None:
    shape = gate_of("V3 without balance loss")
    leaf, load = torch.empty(0, shape.routed, requires_grad=True), torch.ones(shape.routed, dtype=torch.int64)
    weights, experts, _ = route.kernel(leaf, torch.zeros(shape.routed), shape, 2, load)
    (dlogits,) = torch.autograd.grad(weights.sum(), leaf)
    assert (weights.shape, experts.shape, dlogits.shape) == ((0, 8), (0, 8), (0, shape.routed))
    assert bool((load == 1).all())


@pytest.mark.parametrize(
    "name", ["V2-Lite", "V2 without balance loss", "the same without balance loss", "nothing a power of two"]
)
def test_a_gate_keeps_what_is_predicted_on_cuda(name: str) -> None:
    shape, sequences, length = gate_of(name), 2, 9
    logits, bias = clear(shape, sequences, length)
    rows = memory.saved_tensors(
        shape, preset("bf16"), ["layers.1"], memory.MicrobatchSize(sequences * length, sequences)
    )
    with Census() as census:
        held = route.kernel(logits.requires_grad_() * 1.0, bias, shape, sequences, None)[0].grad_fn
    assert census.bytes == sum(row.bytes for row in rows if row.reader in ("gate", "balance loss"))
    del held
