"""DeepSeek-V3's published step, from published rates of kernels (docs/planning.md says which number explains which)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.plan import Plan, make
from dryvine.launch.plan.summary import figures, headline, step_rows
from dryvine.trainer.run_plan import load_plan

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def published() -> Plan:
    return make(load_plan(ROOT / "configs/deepseek_v3_671b.toml"), load_hardware("h800"))


def test_step_tokens_hours_and_cost_are_within_five_percent(published: Plan) -> None:
    """ISCA 2025, table 4, and arXiv 2412.19437, table 1."""
    said = figures(published)
    assert said["step_seconds"] == pytest.approx(19.926, rel=0.05)
    assert said["tokens_per_day"] == pytest.approx(272.8e9, rel=0.05)
    assert said["gpu_hours"] == pytest.approx(2664e3, rel=0.05)
    assert said["cost_dollars"] == pytest.approx(5.328e6, rel=0.05)
    assert said["mfu"] == pytest.approx(0.3894, rel=0.05)
    assert said["mfu_noncausal"] == pytest.approx(0.4373, rel=0.05)


def test_the_run_is_the_published_one(published: Plan) -> None:
    assert published.world == 2048
    assert published.run.schedule.microbatches == 120
    assert published.token_budget == pytest.approx(14.8e12, rel=1e-3)
    assert published.flop_per_token[0] == pytest.approx(250e9, rel=0.01), "ISCA 2025: 250 GFLOP a token"


def test_slots_bubble_and_optimizer_add_up_to_the_step(published: Plan) -> None:
    parts = sum(t.seconds for t in published.by_kind.values()) + published.bubble_seconds + published.optimizer_seconds
    assert parts == pytest.approx(published.step_seconds)


def test_slots_are_counted_and_priced(published: Plan) -> None:
    """DualPipe of 16 ranks and 120 microbatches: reference table; a pair takes less than its two ops."""
    pairs, forwards = published.by_kind["BF"], published.by_kind["F"]
    assert pairs.slots + forwards.slots == 120
    assert forwards.each < pairs.each < forwards.each + published.by_kind["B"].each + 0.02


def test_what_is_not_planned_is_a_line_of_its_own(published: Plan) -> None:
    named = {row[0]: row[1] for row in step_rows(published)}
    assert float(named["bubble, as scheduled"]) == pytest.approx(published.bubble_seconds, rel=1e-3)
    assert named["waits for a slower rank, checkpoints, validation"] == "not planned"


def test_the_json_has_what_programs_were_promised(published: Plan) -> None:
    promised = (
        "step_seconds tokens_per_day gpu_hours cost_dollars bubble_seconds exposed_comm_seconds mfu peak_bytes ranks"
    )
    said = figures(published)
    assert set(promised.split()) <= set(said)
    assert said["peak_bytes"] == max(rank.total for rank in published.ranks)


def test_it_fits_its_own_hardware_with_four_percent_to_spare(published: Plan) -> None:
    """By so much measured peaks have exceeded plans on one GPU (docs/planning.md)."""
    assert headline(published)[-1].startswith("memory: fits")
    assert 1.04 * published.fullest.total < published.machine.usable_bytes


def test_what_does_not_fit_is_said_in_the_headline(published: Plan) -> None:
    small = published.machine.model_copy(update={"memory_gb": 80.0})
    assert "DOES NOT FIT" in headline(replace(published, machine=small))[-1]
