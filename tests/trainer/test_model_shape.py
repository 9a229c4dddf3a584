"""Counts, costs and refusals, all from numbers; and the published configs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Shape, blocks, count_parameters, units
from dryvine.trainer.model.spec import Spec
from tests.support.model import Alone, tiny, whole

CONFIGS = Path(__file__).parents[2] / "configs"


def published(name: str) -> Shape:
    return Shape(**tomllib.loads((CONFIGS / f"{name}.toml").read_text())["model"])


def held(shape: Shape, ep_rank: int = 0, ep_size: int = 1) -> dict[str, int]:
    """Elements by parameter name of a model on the meta device."""
    dispatcher: AnyDispatcher = Alone(shape.routed)
    names = {0: tuple(block.name for block in blocks(shape))}
    model = Model(Spec(shape, torch.bfloat16, "meta", ep_rank, ep_size), names, dispatcher)
    return {name: weight.numel() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("deepseek_v3_671b", 671.0e9, 36.6e9), ("deepseek_v2_lite_16b", 15.7e9, 2.45e9)],
)
def test_published_models_have_their_published_size(name: str, total: float, active: float) -> None:
    """36.6B is the released README_WEIGHTS' exact form of "37B", with the output head and without the embedding."""
    shape = published(name)
    counted = count_parameters(shape)
    assert counted[0] == pytest.approx(total, rel=1e-3)
    assert counted[1] == pytest.approx(active, rel=1e-3)
    on_meta = held(shape)
    assert sum(n for name, n in on_meta.items() if not name.startswith("mtp.")) == counted[0]
    assert sum(on_meta.values()) == count_parameters(shape, mtp=True)[0]


def test_v3_mtp_module_has_its_published_size() -> None:
    shape = published("deepseek_v3_671b")
    assert count_parameters(shape, mtp=True)[0] - count_parameters(shape)[0] == pytest.approx(11.5e9, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"q_lora": None}, {"shared": 0}, {"first_dense": 0, "mtp_depth": 2}])
def test_counts_are_those_of_the_modules(changes: dict[str, Any]) -> None:
    shape = tiny(**changes)
    assert sum(held(shape).values()) == count_parameters(shape, mtp=True)[0]


def test_active_parameters_are_the_total_of_a_model_with_no_expert_idle() -> None:
    shape = tiny(routed=3, groups=1, group_limit=1, top_k=3)
    total, active = count_parameters(shape)
    assert total - active == shape.vocab * shape.hidden


def test_blocks_are_in_order_and_the_tail_is_one_unit() -> None:
    shape = tiny(mtp_depth=2)
    names = ["embed", "layers.0", "layers.1", "layers.2", "head", "mtp.0", "mtp.1"]
    assert [block.name for block in blocks(shape)] == names
    assert [[block.name for block in unit] for unit in units(shape)] == [[n] for n in names[:4]] + [names[4:]]
    assert [block.kind for block in blocks(shape)] == ["embed", "dense", "moe", "moe", "head", "mtp", "mtp"]


def test_costs_are_the_products_of_a_forward() -> None:
    """V3 spends 250 GFLOP a token in training, three times its forward (ISCA'25, table 4)."""
    forward = sum(block.cost for block in blocks(published("deepseek_v3_671b"), 4096) if block.kind != "mtp")
    assert 3 * forward == pytest.approx(250e9, rel=0.05)


def test_a_depth_of_mtp_costs_a_layer_its_projection_and_the_head() -> None:
    cost = {block.name: block.cost for block in blocks(tiny(mtp_depth=1))}
    assert cost["head"] == 2 * 67 * 32
    assert cost["mtp.0"] - cost["layers.1"] - cost["head"] == 2 * (2 * 32) * 32
    assert cost["embed"] == 0


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"first_dense": 4}, "lower it"),
        ({"rope_dim": 3}, "make it even"),
        ({"routed": 9}, "make routed a multiple of groups"),
        ({"group_limit": 5}, "group_limit=5 is more than groups=4: lower it"),
        ({"top_k": 5}, "lower top_k to 4 or raise group_limit"),
        ({"groups": 8, "group_limit": 4}, "lower groups to 4"),
        ({"recompute": ["norms"]}, "norm"),
        ({"experts": 4}, "experts"),
    ],
)
def test_impossible_shapes_are_refused_with_the_fix(changes: dict[str, Any], fix: str) -> None:
    with pytest.raises(ValidationError, match=fix):
        tiny(**changes)


def test_expert_ranks_share_the_experts_and_nothing_else() -> None:
    shape = tiny()
    one, half = held(shape), held(shape, ep_rank=1, ep_size=2)
    assert {name: n / half[name] for name, n in one.items()} == {n: 2.0 if ".experts." in n else 1.0 for n in one}


def test_initial_weights_do_not_depend_on_the_layout() -> None:
    shape = tiny(mtp_depth=1)
    one = whole(shape)
    one.initialise(7)
    parts = []
    for rank in range(2):
        names = {1: ("mtp.0", "head"), 0: ("layers.2", "layers.1", "layers.0", "embed")}
        part = Model(Spec(shape, torch.float32, "meta", ep_rank=rank, ep_size=2), names, Alone(8))
        part.to_empty("cpu")
        part.initialise(7)
        parts.append(dict(part.named_parameters()))
    for name, weight in one.named_parameters():
        assert weight.expert == parts[0][name].expert == (".experts." in name)
        found = torch.cat([part[name] for part in parts]) if weight.expert else parts[1][name]
        assert torch.equal(found, weight), name


def test_a_rank_loads_its_own_experts() -> None:
    shape = tiny()
    one = whole(shape)
    one.initialise(3)
    state = {name: weight.detach() for name, weight in one.named_parameters()} | one.buffers
    names = {0: tuple(block.name for block in blocks(shape))}
    for rank in range(2):
        part = Model(Spec(shape, torch.float32, "cpu", ep_rank=rank, ep_size=2), names, Alone(8))
        part.load(state)
        for name, weight in part.named_parameters():
            theirs = state[name].chunk(2)[rank] if ".experts." in name else state[name]
            assert torch.equal(weight, theirs), name


def test_weights_moved_off_the_meta_device_still_queue_their_gradients() -> None:
    shape = tiny()
    model = whole(shape, device="meta")
    model.to_empty("cpu")
    assert all(weight.queue is not None for _, weight in model.named_parameters())


def test_initial_weights_have_their_deviation_and_differ() -> None:
    shape = tiny(init_std=0.05)
    model = whole(shape)
    model.initialise(0)
    stacked = dict(model.named_parameters())["layers.1.experts.gate_up"]
    assert stacked.detach().std() == pytest.approx(0.05, rel=0.05)
    assert not torch.equal(stacked[0], stacked[1])
    assert not torch.equal(stacked, dict(model.named_parameters())["layers.2.experts.gate_up"]), "the name counts"
    other = whole(shape)
    other.initialise(1)
    assert not torch.equal(stacked, dict(other.named_parameters())["layers.1.experts.gate_up"]), "the seed counts"
    assert all((weight == 1).all() for name, weight in model.named_parameters() if weight.dim() == 1)
