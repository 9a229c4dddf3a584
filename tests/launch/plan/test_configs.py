"""Every config of the repository names its hardware and its data, and can be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.page import plan_page
from dryvine.launch.plan.plan import make
from dryvine.launch.plan.summary import figures, headline
from dryvine.trainer.data.config import STDLIB
from dryvine.trainer.run_plan import load_plan

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
GPUS = {
    "deepseek_v3_671b": 2048,
    "deepseek_v2_lite_16b": 8,
    "moe_1b": 1,
    "moe_3b_2gpu": 2,
    "tiny_cpu": 4,
    "debug_1gpu": 1,
}


def test_no_config_is_forgotten() -> None:
    assert set(GPUS) <= {path.stem for path in CONFIGS.glob("*.toml")}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_it_names_hardware_and_data_and_is_planned(path: Path) -> None:
    run = load_plan(path)
    assert run.config.run.hardware, "run.hardware"
    source = run.config.data.source
    text = path.read_text() + "".join(
        (CONFIGS / "moe_1b.toml").read_text() if "moe_1b.toml" in path.read_text() else ""
    )
    assert source == STDLIB or "dryvine data build" in text, "how its data is made"
    plan = make(run, load_hardware(run.config.run.hardware))
    assert plan.world == GPUS.get(path.stem, plan.world)
    assert plan.step_seconds > 0
    whole = [line.startswith("run: not planned") for line in headline(plan)]
    assert (
        any(whole)
        == (figures(plan)["gpu_hours"] is None)
        == ("GPU hours" not in plan_page(plan))
        == bool(run.config.rl)
    )
    assert plan.fits
