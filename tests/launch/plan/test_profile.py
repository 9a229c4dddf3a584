"""Profiles: phases of every kind of block are timed, a file round trip, and a plan that takes them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from dryvine.launch import profile
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.plan import make
from dryvine.launch.plan.profiled import Profile, read_profile
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.run_plan import make_plan


def profile_of(config: Config) -> Profile:
    return profile.measure(config, torch.device("cpu"), 1, lambda kind: None)


@pytest.mark.parametrize("recipe", ["bf16", "deepseek_v3"])
def test_every_phase_is_timed_and_a_plan_of_another_layout_takes_it(
    tiny: Callable[..., Config], tmp_path: Path, recipe: str
) -> None:
    found = profile_of(tiny(f"fp8.preset={recipe}", "parallel.ep=2"))
    assert {kind: set(phases) for kind, phases in found.phases.items()} == {
        "embed": {"embed"},
        "dense": {"dense"},
        "moe": {"attention", "experts"},
        "head": {"head"},
        "mtp": {"attention", "experts", "head"},
    }
    assert all(forward > 0 and inputs > 0 for kind in found.phases.values() for forward, inputs, _ in kind.values())
    assert all(found.phases[kind]["experts"][2] > 0 for kind in ("moe", "mtp"))
    file = tmp_path / "profile.json"
    file.write_text(found.model_dump_json())
    assert read_profile(file) == found
    other = tiny(f"fp8.preset={recipe}", "parallel.pp=2", "parallel.schedule=dualpipe")
    plan = make(make_plan(other), load_hardware("cpu"), found)
    assert plan.source == "a profile of cpu"
    assert plan.times["head"]["head"].forward == found.phases["head"]["head"][0]
    forward, inputs, weights = found.phases["dense"]["dense"]
    busy = (forward + found.whole * (inputs + weights)) * plan.run.schedule.microbatches
    assert plan.step_seconds > busy


def test_phases_last_until_the_next_begins(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that each reading moves on by one. A MoE layer's messages are its experts'."""
    clock = count(0.0)
    monkeypatch.setattr(profile, "_now", lambda device: next(clock))
    found = profile_of(tiny())
    layer = {"attention": (1, 1, 1), "experts": (4, 3, 1)}
    assert found.phases == {
        "embed": {"embed": (1, 1, 1)},
        "dense": {"dense": (1, 1, 1)},
        "moe": layer,
        "head": {"head": (1, 1, 1)},
        "mtp": {**layer, "head": (1, 1, 1)},
    }
    # As one B, weight gradients begin no phase: of two MoE layers, MTP with its head, and three others.
    inputs, weights = 3 * 4 + 4, 3 * 2 + 4
    assert found.whole == inputs / (inputs + weights)


def test_no_phase_lasts_longer_by_the_lead_of_a_gpu(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that readings move on by one, and leads by more: before each F and B of both schedules."""

    class Leading:
        now, given = 0.0, 0

        def give(self) -> None:
            self.now, self.given = self.now + 1000, self.given + 1

        def read(self, device: torch.device) -> float:
            self.now += 1
            return self.now

    lead = Leading()
    monkeypatch.setattr(profile, "_now", lead.read)
    without = profile_of(tiny())
    monkeypatch.setattr(profile, "_lead", lambda device: lead)
    found = profile_of(tiny())
    assert (found.phases, found.whole) == (without.phases, without.whole)
    assert lead.given == 2 * 2 * 3 * (1 + profile.STEPS)


def test_a_profile_of_something_else_is_refused(tiny: Callable[..., Config], tmp_path: Path) -> None:
    found = profile_of(tiny())
    with pytest.raises(ConfigError, match="another model, dtype or microbatch"):
        make(make_plan(tiny("parallel.microbatch_sequences=2")), load_hardware("cpu"), found)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="no profile"):
        read_profile(broken)
