"""The parts one by one: tied weights, gates and their bias, grouped products, cross entropy, remade tensors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dryvine.parallel.stage import Flight
from dryvine.trainer.model import loss as loss_module
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.gate import choose_experts, move_bias
from dryvine.trainer.model.grouped import add_grouped_product, grouped_linear
from dryvine.trainer.model.loss import cross_entropy
from dryvine.trainer.model.recompute import through
from dryvine.trainer.model.rope import Rope, frequencies
from dryvine.trainer.model.shape import Yarn
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.model.swiglu import swiglu
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.weight import Weight
from tests.support.model import Alone, filled, random_tokens, run_backward, run_forward, tiny, train


def test_one_rank_has_one_parameter_per_name_whatever_its_stages() -> None:
    """Embedding in stage 0 and again in the tail's MTP, head twice in the tail: shared, and both uses add up."""
    shape = tiny(mtp_depth=2)
    together, apart = filled(shape), filled(shape, stages=3)
    tokens = random_tokens(shape)
    assert train(together, tokens) == train(apart, tokens)
    parameters = dict(apart.named_parameters())
    assert len({id(weight) for weight in parameters.values()}) == len(parameters)
    for name, weight in together.named_parameters():
        assert torch.equal(weight.gradient(), parameters[name].gradient()), name


def test_ranks_that_share_a_name_hold_parts_of_its_gradient() -> None:
    """embed.weight on the first rank (inputs) and on the last (MTP): the parts sum to what one rank has."""
    shape = tiny(mtp_depth=1)
    one, first, last = filled(shape), filled(shape, stages=2), filled(shape, stages=2)
    tokens = random_tokens(shape)
    train(one, tokens)
    stages, flights = [first.stages[0], last.stages[1]], [Flight(tokens, 1.0) for _ in range(2)]
    run_forward(stages, flights)
    for closures in run_backward(stages, flights):
        for closure in closures:
            closure()
    whole, *parts = (dict(model.named_parameters())["embed.weight"].gradient() for model in (one, first, last))
    assert all(part.any() for part in parts)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-7)


def test_a_rank_holds_only_what_its_stages_need() -> None:
    shape = tiny(mtp_depth=1)
    tail = Model(Spec(shape, torch.float32, "meta"), {3: ("layers.2", "head", "mtp.0")}, Alone(8))
    tops = {name.split(".")[0] for name, _ in tail.named_parameters()}
    assert tops == {"layers", "norm", "head", "mtp", "embed"}
    assert not any(name.startswith(("layers.0", "layers.1")) for name, _ in tail.named_parameters())
    assert set(tail.loads) == {"layers.2", "mtp.0"}
    assert set(tail.buffers) == {"layers.2.gate.bias", "mtp.0.layer.gate.bias"}


def test_choices_stay_within_the_best_groups_and_follow_the_bias() -> None:
    shape = tiny()
    scores = torch.rand(500, 8, generator=torch.Generator().manual_seed(0))
    experts = choose_experts(scores, torch.zeros(8), shape)
    assert all(len(set(row)) == 3 and len({e // 2 for e in row}) <= 2 for row in experts.tolist())
    pushed = choose_experts(scores, torch.tensor([0.0, 0, 0, 0, 0, 0, 2, 2]), shape)
    assert all({6, 7} <= set(row) for row in pushed.tolist())


def test_bias_orders_the_choice_but_does_not_weigh() -> None:
    shape = tiny(layers=1, first_dense=0)
    model = filled(shape)
    gate = model.root["layers"]["0"].gate
    gate.bias.fill_(5.0)
    logits = torch.randn(20, 8)
    weights, experts, _ = gate.choose(logits, 1, count=False)
    raw = logits.sigmoid().gather(1, experts)
    torch.testing.assert_close(weights, raw / raw.sum(-1, keepdim=True) * shape.route_scale)


def test_loads_count_every_training_choice_once_until_reset() -> None:
    shape = tiny(mtp_depth=1)
    model, tokens = filled(shape), random_tokens(shape, 2, 12)
    train(model, tokens)
    once = {name: load.clone() for name, load in model.loads.items()}
    assert {name: int(load.sum()) for name, load in once.items()} == dict.fromkeys(
        ("layers.1", "layers.2", "mtp.0"), 2 * 12 * shape.top_k
    )
    train(model, tokens)
    assert all(torch.equal(load, 2 * once[name]) for name, load in model.loads.items())
    model.reset_loads()
    assert all(load.sum() == 0 for load in model.loads.values())


def test_bias_falls_where_load_is_above_the_mean_and_rises_elsewhere() -> None:
    bias = torch.tensor([0.5, 0.0, 0.0, 0.0])
    move_bias(bias, torch.tensor([9, 4, 4, 3]), 0.125)
    assert bias.tolist() == [0.375, 0.125, 0.125, 0.125]


def test_a_load_equal_to_the_mean_is_not_above_it() -> None:
    bias = torch.zeros(3)
    move_bias(bias, torch.tensor([2, 2, 2]), 0.125)
    assert bias.tolist() == [0.125] * 3


def test_bias_update_balances_a_skewed_gate() -> None:
    """The mechanism as a whole: a gate that prefers two experts spreads its load within a few dozen steps."""
    shape = tiny(layers=1, first_dense=0, top_k=2, groups=1, group_limit=1)
    model = filled(shape)
    scores = torch.rand(400, 8, generator=torch.Generator().manual_seed(0)) * 0.3
    scores[:, :2] += 0.5
    gate = model.root["layers"]["0"].gate
    gate.bias.zero_()
    worst = []
    for _ in range(80):
        model.reset_loads()
        gate.choose(scores.logit(), 1, count=True)
        worst.append(float(gate.load.max() / gate.load.double().mean()))
        model.update_biases(model.loads, 0.01)
    assert worst[0] == 4.0
    assert worst[-1] < 1.25


def test_yarn_slows_pairs_between_its_bounds_and_no_others() -> None:
    """Bounds by hand: with theta 1e4, 64 dimensions and 4096 positions a pair turns 32 times at number 10.4, once at
    22.5; the ramp runs from 10 to 23, and the wavelength at its end is 40 times as long."""
    plain = frequencies(64, 1e4, None)
    slowed = frequencies(64, 1e4, Yarn(factor=40, original=4096)) / plain
    expected = [1 - min(max((pair - 10) / 13, 0), 1) * (1 - 1 / 40) for pair in range(32)]
    torch.testing.assert_close(slowed, torch.tensor(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(slowed[10:13], torch.tensor([1.0, 0.925, 0.85]))


def test_a_rope_has_a_table_for_each_length() -> None:
    rope = Rope(tiny())
    short, long = (rope.table(length, torch.device("cpu")) for length in (5, 9))
    assert (len(short[0]), len(long[0])) == (5, 9)
    assert all(torch.equal(a, b[:5]) for a, b in zip(short, long, strict=True))
    assert rope.table(5, torch.device("cpu")) is short


@pytest.mark.parametrize("counts", [[3, 0, 2, 0], [0, 0, 0, 0], [0, 5, 0, 0]])
def test_grouped_product_with_idle_experts(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = Weight(torch.randn(4, 6, 5, generator=generator))
    x = torch.randn(sum(counts), 5, generator=generator, requires_grad=True)
    y = grouped_linear(x, weight, ExpertGroups.of(counts, x))
    dy = torch.randn(y.shape, generator=generator)
    y.backward(dy)
    other, plain = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    parts = [part @ w.T for part, w in zip(other.split(counts), plain, strict=True)]
    torch.cat(parts).backward(dy)
    assert other.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(weight.gradient(), plain.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_of_experts_are_added_expert_by_expert(dtype: torch.dtype) -> None:
    counts, generator = (3, 0, 70), torch.Generator().manual_seed(0)
    dy, x = (torch.randn(73, size, generator=generator).to(dtype) for size in (6, 5))
    held = torch.randn(3, 6, 5, generator=generator)
    total = held.clone()
    add_grouped_product(total, dy, x, ExpertGroups.of(counts, x))
    parts = zip(held, dy.split(counts), x.split(counts), strict=True)
    assert torch.equal(total, torch.stack([one.addmm(d.float().t(), r.float()) for one, d, r in parts]))


@pytest.mark.parametrize("counts", [(3, 0, 2, 0), (0, 0), (5,)])
def test_ends_of_groups(counts: tuple[int, ...]) -> None:
    groups = ExpertGroups(counts, torch.device("cpu"))
    rows = torch.arange(groups.rows)
    bounds = [0, *groups.ends.tolist()]
    assert [rows[a:b].tolist() for a, b in pairwise(bounds)] == [part.tolist() for part in rows.split(counts)]


@pytest.mark.parametrize("elements", [1, 40, 1 << 20])
def test_cross_entropy_in_slices(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "SLICE_ELEMENTS", elements)
    logits = (torch.randn(11, 17, generator=torch.Generator().manual_seed(0)) * 20).requires_grad_()
    targets = torch.arange(11)
    plain = torch.nn.functional.cross_entropy(logits, targets)
    (expected,) = torch.autograd.grad(plain, logits)
    mine = cross_entropy(logits, targets)
    (grad,) = torch.autograd.grad(mine * 3, logits)
    torch.testing.assert_close(mine, plain)
    torch.testing.assert_close(grad, 3 * expected)


def test_swiglu_gradient_is_autograds() -> None:
    x = torch.randn(7, 10, dtype=torch.float32, requires_grad=True)
    weights = torch.rand(7, requires_grad=True)
    gate, up = x.chunk(2, -1)
    plain = torch.nn.functional.silu(gate) * up * weights.unsqueeze(-1)
    dy = torch.randn(plain.shape)
    expected = torch.autograd.grad(plain, (x, weights), dy)
    torch.testing.assert_close(torch.autograd.grad(swiglu(x, weights), (x, weights), dy), expected)


@pytest.mark.parametrize("again", [False, True])
def test_a_remade_tensor_is_dropped_and_made_once_for_all_who_saved_it(again: bool) -> None:
    x = torch.randn(5, 3, requires_grad=True)
    made: list[StorageWeakRef] = []

    def make() -> tuple[torch.Tensor]:
        tensor = x.exp().clone()  # exp saves its result, clone nothing
        made.append(StorageWeakRef(tensor.untyped_storage()))
        return (tensor,)

    out = through(make, lambda t: (t.square(), t.sin()), again)
    assert made[0].expired() == again
    (grad,) = torch.autograd.grad(sum(o.sum() for o in out), x)
    assert len(made) == (2 if again else 1)
    assert all(one.expired() for one in made)
    e = x.exp()
    torch.testing.assert_close(grad, (2 * e + e.cos()) * e)
