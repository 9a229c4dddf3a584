"""What a stage keeps between F and B: as predicted, within 2%, for every kind of block, recipe and recompute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.support.census import Census
from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.parallel.stage import Flight, Stage, State
from dryvine.trainer.activations import activations, microbatch_size, stage_bytes
from dryvine.trainer.config import Config
from dryvine.trainer.fp8.engines.emulate import Emulate
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.recipe import Recipe, preset
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.memory import MicrobatchSize, saved_bytes, saved_tensors
from dryvine.trainer.model.shape import Shape, blocks
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.run_plan import make_plan
from tests.support import model as helpers_model
from tests.support.model import random_tokens, run_backward

SEQUENCES, LENGTH = 2, 40
WAYS = ("norm", "mla_up", "swiglu")
RECIPES = {
    "bf16": preset("bf16"),
    "fp8": preset("deepseek_v3"),
    "fp8 after attention": preset("deepseek_v3", cache_after_attention="fp8"),
    "fp8, rows sent in bf16": preset("deepseek_v3", dispatch="bf16"),
}
STAGES = {"dense": ("layers.0",), "moe": ("layers.1",), "ends": ("embed", "head", "mtp.0")}


def middle(**changes: Any) -> Shape:
    """Wide enough that what is left out, scalars, is far below 2%."""
    return helpers_model.tiny(hidden=64, ffn=160, expert_ffn=96, vocab=96, mtp_depth=1, **changes)


def forward(stage: Stage, flight: Flight, x: torch.Tensor | None) -> None:
    state: State = () if x is None else (x,)
    for phase in stage.phases:
        state = phase.forward(state, flight).wait()


def measured(
    shape: Shape, recipe: Recipe, names: tuple[str, ...], dtype: torch.dtype = torch.bfloat16, alone: bool = False
) -> int:
    fp8 = FP8(recipe, Emulate(), "") if recipe.fp8 else None
    dispatcher = SingleRank(shape.routed) if alone else Flat(GroupExchange(None), shape.routed)
    model = Model(Spec(shape, dtype, "cpu", fp8=fp8), {0: names}, dispatcher)
    model.initialise(0)
    tokens = random_tokens(shape, SEQUENCES, LENGTH)
    x = None if names[0] == "embed" else torch.randn(SEQUENCES * LENGTH, shape.hidden).to(dtype)
    forward(model.stages[0], Flight(tokens, 1.0), x)  # makes what all microbatches share
    with Census() as census:
        flight = Flight(tokens, 1.0)
        forward(model.stages[0], flight, x)
    before = census.bytes + (0 if x is None else x.nbytes)
    if names[-1] == "mtp.0":  # a backward that starts from losses alone
        run_backward([model.stages[0]], [flight])
        del flight
        assert census.bytes < before / 10  # a cast that the next microbatch replaces may stay
    return before


def size(dtype_bytes: int = 2) -> MicrobatchSize:
    return MicrobatchSize(SEQUENCES * LENGTH, SEQUENCES, dtype_bytes, cuda=False)


@pytest.mark.parametrize("names", STAGES.values(), ids=STAGES.keys())
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_bytes_kept_are_those_predicted(recipe: Recipe, names: tuple[str, ...]) -> None:
    shape = middle()
    assert saved_bytes(shape, recipe, names, size()) == pytest.approx(measured(shape, recipe, names), rel=0.02)


@pytest.mark.parametrize("ways", [("norm",), ("mla_up",), ("swiglu",), WAYS, ("layer",), (*WAYS, "layer")])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_each_recompute_saves_what_is_predicted(recipe: Recipe, ways: tuple[str, ...]) -> None:
    shape, names = middle(recompute=ways), ("layers.0", "layers.1", "head", "mtp.0")
    assert saved_bytes(shape, recipe, names, size()) == pytest.approx(measured(shape, recipe, names), rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora": None},
        {"q_lora": None, "recompute": WAYS},
        {"v_dim": 12},
        {"shared": 0},
        {"score": "softmax", "normalise": False, "balance_alpha": 0.0},
    ],
)
@pytest.mark.parametrize("recipe", [RECIPES["bf16"], RECIPES["fp8"]], ids=["bf16", "fp8"])
def test_other_architectures(recipe: Recipe, changes: dict[str, Any]) -> None:
    shape, names = middle(**changes), ("layers.1",)
    assert saved_bytes(shape, recipe, names, size()) == pytest.approx(measured(shape, recipe, names), rel=0.02)


@pytest.mark.parametrize("recipe", [RECIPES["bf16"], RECIPES["fp8"]], ids=["bf16", "fp8"])
def test_a_rank_alone_keeps_fewer_indexes(recipe: Recipe) -> None:
    shape, batch = middle(), size()
    alone = replace(batch, single_rank=True)
    saved = measured(shape, recipe, ("layers.1",)) - measured(shape, recipe, ("layers.1",), alone=True)
    counts = 8 * (shape.routed + 1)  # in flat's handle, and too few to be predicted
    predicted = saved_bytes(shape, recipe, ("layers.1",), batch) - saved_bytes(shape, recipe, ("layers.1",), alone)
    assert saved - counts == predicted > 0


def test_fp32_keeps_twice_as_much() -> None:
    shape, names = middle(), ("layers.0", "layers.1")
    found = measured(shape, RECIPES["bf16"], names, torch.float32)
    assert saved_bytes(shape, RECIPES["bf16"], names, size(4)) == pytest.approx(found, rel=0.02)


def test_every_byte_has_a_name_and_a_reader() -> None:
    shape = middle()
    names = [block.name for block in blocks(shape)]
    rows = saved_tensors(shape, RECIPES["fp8"], names, size())
    assert [*dict.fromkeys(row.block for row in rows)] == names
    assert all(row.phase and row.what and row.reader and row.bytes > 0 for row in rows)
    assert len({(row.block, row.phase, row.what, row.reader) for row in rows}) == len(rows)


def test_attention_keeps_a_log_sum_exp_for_each_head_and_token() -> None:
    """Too small a share to show in the 2% of a whole stage."""
    (row,) = (r for r in saved_tensors(middle(), RECIPES["bf16"], ["layers.1"], size()) if "log-sum-exp" in r.what)
    assert row == ("layers.1", "attention", "log-sum-exp of scores", "attention core", 4 * 4 * SEQUENCES * LENGTH)


def bytes_of(what: str, block: str = "layers.1", size: MicrobatchSize | None = None, **changes: Any) -> list[int]:
    """Of the rows of that name in one block: on a GPU, five tokens in one sequence, unless `size` says otherwise."""
    rows = saved_tensors(middle(**changes), RECIPES["bf16"], [block], size or MicrobatchSize(5, 1))
    return [row.bytes for row in rows if row.what == what]


def test_small_tensors_by_hand() -> None:
    """Each is less than the 2% of a stage; and those of a GPU no CPU can measure."""
    assert bytes_of("choices") == [8 * 5 * 3]
    assert bytes_of("logits") == [4 * 5 * 8]
    assert bytes_of("queries, keys, values") == [2 * 5 * 4 * ((8 + 4) + (8 + 4) + (8 + 8))]
    assert bytes_of("output of the heads") == [2 * 5 * 4 * 8]
    assert bytes_of("tokens", "embed") == []
    assert bytes_of("tokens", "embed", MicrobatchSize(10, 2)) == [8 * 10]


def test_the_last_heads_norm_alone_can_be_recomputed() -> None:
    """Others hand their normed x to the next depth, which keeps it."""
    ways = ("norm",)
    assert bytes_of("x, normed", "head", recompute=ways) == [2 * 5 * 64]
    assert bytes_of("x, normed", "mtp.0", recompute=ways) == []
    assert bytes_of("x, normed", "mtp.0") == [2 * 5 * 64] * 2, "before attention, and before the head"


def test_fp8_rows_have_scales_of_four_rows_at_least() -> None:
    rows = saved_tensors(middle(), RECIPES["fp8"], ["layers.1"], MicrobatchSize(5, 1))
    (scaled,) = (row for row in rows if row.what == "x, normed" and row.reader == "q_a, kv_a")
    assert scaled.bytes == 5 * 64 + 4 * 1 * 8


def test_a_run_holds_what_its_schedule_keeps_in_flight(tiny: Callable[..., Config]) -> None:
    plan = make_plan(tiny("parallel.pp=2", "parallel.schedule=one_f_one_b"))
    sizes = stage_bytes(plan, cuda=False)
    peak = 2 * sizes[0]
    assert peak > sizes[1] == plan.footprint.most_held(1, sizes)
    said = f"activations kept for backwards: at most {peak / 1e9:.3g} GB, on pipeline rank 0 of 2"
    assert activations(plan, cuda=False) == said


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ((), MicrobatchSize(32, 1, 4, False, single_rank=True)),
        (("parallel.microbatch_sequences=2", "run.dtype=bf16"), MicrobatchSize(64, 2, 2, False, single_rank=True)),
        (("parallel.ep=2",), MicrobatchSize(32, 1, 4, False, single_rank=False, ep=2)),
        (("comm.dispatcher=hierarchical",), MicrobatchSize(32, 1, 4, False, single_rank=False)),
    ],
)
def test_a_microbatch_of_a_run(tiny: Callable[..., Config], overrides: tuple[str, ...], size: MicrobatchSize) -> None:
    assert microbatch_size(tiny(*overrides), cuda=False) == size
