"""What ops hold beside saved tensors: from I to W, and on streams that hold what they have read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from benchmarks.support.census import Census
from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.dispatch.flat import Flat
from dryvine.parallel.stage import Flight, Grads, State
from dryvine.trainer.activations import flight_sizes, most_held
from dryvine.trainer.config import Config
from dryvine.trainer.fp8.engines.emulate import Emulate
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.recipe import Recipe, preset
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.memory import MicrobatchSize, deferred_bytes, passed_bytes, saved_bytes
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.stream_memory import BlockNeed, most_at_once, most_running, running_bytes
from tests.support import model as helpers_model
from tests.support.live import evenly
from tests.support.model import random_tokens

# Each expert receives a whole number of FP8's tiles.
SEQUENCES, LENGTH = 2, 512
RECIPES = {
    "bf16": preset("bf16"),
    "fp8": preset("deepseek_v3"),
    "fp8, rows sent in bf16": pytest.param(preset("deepseek_v3", dispatch="bf16"), marks=pytest.mark.long),
}
WAYS = [(), pytest.param(("norm", "swiglu"), marks=pytest.mark.long), ("norm", "mla_up", "swiglu"), ("layer",)]
NAMES = ("layers.0", "layers.1", "head", "mtp.0")


class Left(NamedTuple):
    """Bytes after an op of a stage: what its flight keeps, and with what streams hold that let go of nothing."""

    flight: int
    slot: int


def played(shape: Shape, recipe: Recipe) -> tuple[Left, Left]:
    """An F, and an I whose W has not run."""
    fp8 = FP8(recipe, Emulate(), "") if recipe.fp8 else None
    model = Model(Spec(shape, torch.bfloat16, "cpu", fp8=fp8), {0: NAMES}, Flat(GroupExchange(None), shape.routed))
    model.initialise(0)
    for gate in model.gates.values():
        gate.choose = evenly(gate)  # type: ignore[method-assign]
    tokens = random_tokens(shape, SEQUENCES, LENGTH)
    _play(model, tokens)  # makes what all microbatches share
    return _play(model, tokens)


def _play(model: Model, tokens: torch.Tensor) -> tuple[Left, Left]:
    held: list[object] = []
    state: State = (torch.randn(SEQUENCES * LENGTH, model.spec.shape.hidden).bfloat16(),)
    stage, flight, grads = model.stages[0], Flight(tokens, 1.0), Grads()
    with Census() as census:
        state = (state[0].clone(),)
        for phase in stage.phases:
            held.append(state)
            state = phase.forward(state, flight).wait()
        forward = _ended(census, held)
        for phase in reversed(stage.phases):
            held.append(grads)
            result = phase.backward(grads, flight)
            held.append(result.spent)
            flight.wgrads.append(result.closures)
            grads = result.value.wait()
            del result
        held.append(grads)
        del grads
        return forward, _ended(census, held)


def _ended(census: Census, held: list[object]) -> Left:
    slot = census.bytes
    held.clear()
    return Left(census.bytes, slot)


@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: "+".join(ways) or "kept")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_what_ops_hold_is_predicted(recipe: Recipe, ways: tuple[str, ...]) -> None:
    widths = {"hidden": 128, "ffn": 256, "expert_ffn": 128, "vocab": 128}
    shape = helpers_model.tiny(**widths, max_position=LENGTH, mtp_depth=1, recompute=ways)
    size = MicrobatchSize(SEQUENCES * LENGTH, SEQUENCES, 2, cuda=False)
    forward, backward = played(shape, recipe)
    kept, left = (count(shape, recipe, NAMES, size) for count in (saved_bytes, deferred_bytes))
    passed = passed_bytes(shape, recipe, NAMES, size)
    assert forward.flight == pytest.approx(kept, rel=0.001)
    assert forward.slot == pytest.approx(kept + passed.forward, rel=0.01)
    assert backward.flight == pytest.approx(kept + left, rel=0.01)
    assert backward.slot == pytest.approx(kept + left + passed.backward, rel=0.01)


def test_what_streams_hold_of_blocks_that_ran() -> None:
    """A MoE layer has two compute steps, so with the one that runs two layers are held, or four of one step."""
    layer, step = BlockNeed(10, 3, 4, 2), BlockNeed(10, 3, 4, 1)
    assert most_at_once([layer]) == 10
    assert most_at_once([layer] * 2) == 20
    assert most_at_once([layer] * 3) == 20, "the first layer is let go, and has freed 4 of its flight"
    assert most_at_once([step] * 6) == 40
    assert most_at_once([layer, layer._replace(own=17)]) == 27, "while it runs; then 20"


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_only_streams_that_overlap_hold(tiny: Callable[..., Config], overlap: str) -> None:
    plan = make_plan(tiny("parallel.pp=2", "parallel.schedule=zb1p", f"parallel.overlap={overlap}"))
    assert running_bytes(plan, cuda=False) == {}
    running = running_bytes(plan, cuda=True)
    assert bool(running) is (overlap == "on")
    sizes = flight_sizes(plan, cuda=True)
    more = zip(most_running(plan, sizes, running), most_held(plan, sizes), strict=True)
    assert all((a > b) is (overlap == "on") for a, b in more)
