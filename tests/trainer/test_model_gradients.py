"""Every gradient of phases and closures against plain autograd on an independent model (reference_model.py)."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dryvine.parallel.stage import Flight
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Shape, Yarn
from tests.support import reference_model
from tests.support.model import filled, random_tokens, run_backward, run_forward, tiny, train

SHAPES = {
    "v3 with mtp": {"mtp_depth": 2},
    "yarn": {"yarn": Yarn(factor=8, original=16, mscale=0.7), "rope_dim": 8},
    "no shared expert": {"shared": 0, "first_dense": 0},
    "v2": {"score": "softmax", "normalise": False, "route_scale": 1.0, "shared": 2, "q_lora": None, "groups": 2,
           "group_limit": 1},
    "softmax, normalised": {"score": "softmax", "groups": 1, "group_limit": 1},
    "strong balance": {"balance_alpha": 3.0},
}  # fmt: skip


def reference(model: Model, shape: Shape, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    params = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    losses = reference_model.losses(params | model.buffers, shape, tokens)
    torch.stack(list(losses.values())).sum().backward()
    return losses, {name: p.grad for name, p in params.items() if p.grad is not None}


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value: relative to the tensor, not to its smallest entries."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_losses_and_gradients_equal_plain_autograd(changes: dict[str, Any]) -> None:
    shape = tiny(**changes)
    model, tokens = filled(shape), random_tokens(shape)
    theirs, grads = reference(model, shape, tokens)
    ours = train(model, tokens)
    assert ours.keys() == theirs.keys()
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss.detach(), rtol=1e-6, atol=1e-7)
    parameters = dict(model.named_parameters())
    assert grads.keys() == parameters.keys()
    assert {n: d for n, g in grads.items() if (d := deviation(parameters[n].gradient(), g)) > 1e-5} == {}
    assert all(weight.grad is None for weight in parameters.values())


def test_the_balance_loss_alone_moves_the_gate_towards_balance() -> None:
    """The head silenced, only the balance loss has a gradient; following it must even out the load."""
    shape = tiny(balance_alpha=1.0, layers=1, first_dense=0)
    model, tokens = filled(shape), random_tokens(shape, 3)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        parameters["head.weight"].zero_()
    gate, values = parameters["layers.0.gate.weight"], []
    for _ in range(40):
        values.append(float(train(model, tokens)["balance.layers.0"]))
        with torch.no_grad():
            gate.sub_(gate.gradient())
        gate.main_grad = None
    assert values[0] > 1.01  # 1 is perfect balance
    assert values[-1] < 1 + (values[0] - 1) / 2


def test_without_balance_loss_and_head_the_gate_stays() -> None:
    shape = tiny(balance_alpha=0.0, layers=1, first_dense=0)
    model = filled(shape)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        parameters["head.weight"].zero_()
    assert set(train(model, random_tokens(shape))) == {"loss"}
    assert not parameters["layers.0.gate.weight"].gradient().any()


def test_loss_scale_scales_every_gradient() -> None:
    shape, scale = tiny(mtp_depth=1, balance_alpha=1.0), 0.25
    one, quarter = filled(shape), filled(shape)
    tokens = random_tokens(shape)
    train(one, tokens)
    train(quarter, tokens, scale)
    for (name, a), (_, b) in zip(one.named_parameters(), quarter.named_parameters(), strict=True):
        assert torch.equal(a.gradient() * scale, b.gradient()), name


def test_bits_do_not_depend_on_when_weight_gradients_run() -> None:
    shape = tiny(mtp_depth=1)
    model, tokens = filled(shape), [random_tokens(shape, seed=i) for i in range(2)]
    for each in tokens:
        train(model, each)
    late = filled(shape)
    left = []
    for each in tokens:
        flights = [Flight(each, 1.0)]
        run_forward([late.stages[0]], flights)
        left.append(run_backward([late.stages[0]], flights))
    with torch.no_grad():
        for _, weight in late.named_parameters():
            weight.mul_(1.5)  # as an optimizer would; what is still to run must not see it
    for flight in left:
        for closures in flight:
            for closure in closures:
                closure()
    for (name, a), (_, b) in zip(model.named_parameters(), late.named_parameters(), strict=True):
        assert torch.equal(a.gradient(), b.gradient()), name


def test_backward_for_inputs_leaves_every_weight_gradient_to_closures() -> None:
    shape = tiny(mtp_depth=1)
    model = filled(shape)
    flights = [Flight(random_tokens(shape), 1.0)]
    run_forward([model.stages[0]], flights)
    run_backward([model.stages[0]], flights)
    assert all(weight.main_grad is None and weight.grad is None for _, weight in model.named_parameters())


def test_gradients_accumulate_in_fp32_under_bf16() -> None:
    """A thousand equal microbatches: a BF16 sum would stop growing at 256 times the first."""
    shape = tiny(layers=1, first_dense=0)
    model = filled(shape, dtype=torch.bfloat16)
    flights = [Flight(random_tokens(shape), 1.0)]
    run_forward([model.stages[0]], flights)
    closures = [c for phase in run_backward([model.stages[0]], flights) for c in phase]
    for closure in closures:
        closure()
    once = {name: weight.gradient().clone() for name, weight in model.named_parameters()}
    for _ in range(999):
        for closure in closures:
            closure()
    for name, weight in model.named_parameters():
        assert weight.gradient().dtype == torch.float32
        torch.testing.assert_close(weight.gradient(), once[name] * 1000, rtol=1e-3, atol=1e-6)


class Calls(TorchDispatchMode):
    """Counts matrix products and attention forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.products += name in ("mm", "addmm", "addmm_")
        self.attentions += name == "_scaled_dot_product_flash_attention_for_cpu"
        return func(*args, **(kwargs or {}))


def trained_alike(plain: Model, saving: Model, tokens: Tensor) -> tuple[Calls, Calls]:
    """Train both, to the same losses and gradients. What each has called."""
    with Calls() as before:
        losses = train(plain, tokens)
    with Calls() as after:
        assert train(saving, tokens) == losses
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert torch.equal(a.gradient(), b.gradient()), name
    return before, after


WAYS = ("norm", "mla_up", "swiglu")


@pytest.mark.parametrize("ways", [w for n in range(1, 4) for w in combinations(WAYS, n)], ids="+".join)
def test_recompute_gives_the_same_bits_and_runs_no_more_than_it_must(ways: tuple[str, ...]) -> None:
    shape = tiny(mtp_depth=1, v_dim=8, nope_dim=8, rope_dim=4)
    again = tiny(mtp_depth=1, recompute=ways, v_dim=8, nope_dim=8, rope_dim=4)
    plain, saving, tokens = filled(shape), filled(again), random_tokens(shape)
    before, after = trained_alike(plain, saving, tokens)
    layers = shape.layers + shape.mtp_depth
    assert before.attentions == after.attentions == layers
    assert after.products - before.products == (2 * layers if "mla_up" in ways else 0)  # q_b and kv_b once more


@pytest.mark.parametrize("others", [(), WAYS], ids=["alone", "with the others"])
@pytest.mark.parametrize("changes", [{}, {"q_lora": None, "shared": 0}, {"score": "softmax", "normalise": False}])
def test_recompute_of_whole_layers_gives_the_same_bits(others: tuple[str, ...], changes: dict[str, Any]) -> None:
    """Losses, gradients, and the load of experts, which is counted once; the core runs once more in each layer."""
    shape, again = (tiny(mtp_depth=1, recompute=ways, **changes) for ways in ((), ("layer", *others)))
    plain, saving, tokens = filled(shape), filled(again), random_tokens(shape)
    before, after = trained_alike(plain, saving, tokens)
    assert all(torch.equal(plain.loads[name], saving.loads[name]) for name in plain.loads)
    assert after.attentions == 2 * before.attentions


def test_validation_keeps_nothing_and_counts_nothing() -> None:
    shape = tiny(mtp_depth=1)
    model = filled(shape)
    flight = Flight(random_tokens(shape), 0.0, training=False)
    losses = run_forward([model.stages[0]], [flight])
    assert not flight.saved
    assert all(load.sum() == 0 for load in model.loads.values())
    assert losses == train(model, flight.tokens)
