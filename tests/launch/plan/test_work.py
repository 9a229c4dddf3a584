"""Arithmetic by kernel adds up to what the partition counts, and times follow from it."""

from __future__ import annotations

import pytest

from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.times import OpTimes, StagePrices, roofline
from dryvine.launch.plan.traffic import Messages
from dryvine.launch.plan.work import STREAM, Task, tasks
from dryvine.parallel.schedule.ir import Op
from dryvine.trainer.fp8.recipe import preset
from dryvine.trainer.model.memory import MicrobatchSize
from dryvine.trainer.model.shape import blocks
from tests.support.model import tiny

WAYS = ("norm", "mla_up", "swiglu")


@pytest.mark.parametrize("changes", [{}, {"q_lora": None}, {"shared": 0}])
def test_forward_flop_is_that_of_the_partition(changes: dict[str, object]) -> None:
    shape, size = tiny(mtp_depth=1, **changes), MicrobatchSize(64, 2, 4)
    for block in blocks(shape, 32):
        work = tasks(shape, preset("bf16"), block.kind, size, 32)
        # The partition leaves out nothing but counts norms' weights as products.
        flop = sum(t.forward for t in work if t.kernel != STREAM)
        assert flop == pytest.approx(64 * block.cost, rel=0.02), block


def test_backward_is_two_products_for_one_and_five_for_two_in_the_core() -> None:
    shape, size = tiny(), MicrobatchSize(64, 2)
    work = [t for t in tasks(shape, preset("bf16"), "moe", size, 32) if t.kernel not in (STREAM,)]
    products = [t for t in work if not t.kernel.startswith("attention")]
    assert sum(t.forward for t in products) == sum(t.inputs for t in products) == sum(t.weights for t in products)
    forward, backward = (
        sum(getattr(t, op) for t in work if t.kernel.startswith("attention")) for op in ("forward", "inputs")
    )
    assert backward / forward == pytest.approx((3 * shape.qk_dim + 2 * shape.v_dim) / (shape.qk_dim + shape.v_dim))


def test_recompute_costs_what_it_does_again() -> None:
    plain, again = (
        sum(
            t.inputs
            for t in tasks(tiny(recompute=ways), preset("bf16"), "moe", MicrobatchSize(64, 2), 32)
            if t.kernel != STREAM
        )
        for ways in ((), WAYS)
    )
    s = tiny()
    up = 2 * 64 * (s.kv_lora * s.heads * (s.nope_dim + s.v_dim) + (s.q_lora or 0) * s.heads * s.qk_dim)
    assert again - plain == up


def test_casts_take_their_share_of_fp8_but_not_of_the_head() -> None:
    machine = load_hardware("h800")
    work = [Task("experts", "fp8", forward=machine.tflops.fp8 * 1e12), Task("head", "bf16", machine.tflops.bf16 * 1e12)]
    times = roofline(work, machine, fp8=True)
    assert times["experts"].forward == pytest.approx(1 / (1 - machine.casts))
    assert times["head"].forward == pytest.approx(1)


def prices(overlap: bool = True, pace: float = 1.0) -> StagePrices:
    block = {"attention": OpTimes(2, 3, 1), "experts": OpTimes(4, 5, 2), "head": OpTimes(1, 1, 1)}
    return StagePrices(((block,), (block, block)), Messages(1, 2, 1, 2), overlap, pace)


def test_ops_alone_wait_for_their_messages() -> None:
    p = prices()
    assert p.lone(Op("F", 0, 0)) == 2 + 1 + 4 + 2 + 1
    assert p.lone(Op("I", 0, 0)) == 1 + 1 + 5 + 2 + 3
    assert p.lone(Op("B", 0, 0)) == p.lone(Op("I", 0, 0)) + p.lone(Op("W", 0, 0)) == 12 + 4
    assert p.lone(Op("F", 1, 0)) == 20


def test_a_pair_hides_messages_and_costs_no_less_than_its_arithmetic() -> None:
    slot = (Op("F", 0, 0), Op("B", 0, 1))
    p = prices()
    assert p.compute(slot) == 7 + 13
    assert p.compute(slot) <= p.slot(slot) < p.lone(slot[0]) + p.lone(slot[1])
    assert p.exposed(slot) == p.slot(slot) - p.compute(slot)
    assert prices(overlap=False).slot(slot) == p.lone(slot[0]) + p.lone(slot[1])
    assert prices(pace=1.5).slot(slot) >= 1.5 * p.compute(slot)
