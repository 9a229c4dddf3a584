"""Alarms: one for every way in which a run goes wrong, and how they end it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from dryvine.trainer.config import Config
from dryvine.trainer.nonfinite import Diverged
from dryvine.trainer.rl.alarms import WINDOW, AlarmMemory
from dryvine.trainer.rl.config import Alarms
from dryvine.trainer.run_rows import read
from tests.support.digits import go

Tiny = Callable[..., Config]


def sound(**changes: float | None) -> dict[str, float | None]:
    return {
        "reward": 0.3, "mismatch_k3": 1e-7, "mismatch_logprob": 1e-4, "route_mismatch": 0.0, "clip_fraction": 0.01,
        "entropy": 0.8, "zero_variance": 0.3, "unscored": 0.0, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mismatch_k3": 0.1}, "mismatch_k3: 0.1 is over 0.01"),
        ({"mismatch_logprob": math.nan}, "mismatch_logprob: nan"),
        ({"route_mismatch": 0.5}, 'set rl.replay = "rollout"'),
        ({"clip_fraction": 0.9}, "clip_fraction"),
        ({"entropy": 0.001}, "one answer is left"),
        ({"entropy": 5.0}, "become noise"),
        ({"zero_variance": 1.0}, "too easy or too hard"),
        ({"unscored": 0.2}, "verifiers fail"),
        ({}, None),
        ({"mismatch_k3": None, "entropy": None}, None),
    ],
)
def test_an_alarm_for_every_way_to_go_wrong(change: dict[str, float | None], said: str | None) -> None:
    found = AlarmMemory(Alarms()).check(sound(**change))
    assert bool(found) == bool(said)
    assert said is None or said in found[0]


def test_a_reward_that_falls_is_an_alarm() -> None:
    memory = AlarmMemory(Alarms(action="stop", patience=2))
    for reward in [0.1, 0.2, 0.3] + [0.4] * WINDOW:
        assert not memory.check(sound(reward=reward))
    falling = [memory.check(sound(reward=0.0)) for _ in range(WINDOW)]
    assert not falling[0]
    assert "reward: its mean over 8 rollouts" in falling[-1][0]
    assert memory.stops


def test_a_rollout_that_nobody_could_score_is_no_reward_of_zero() -> None:
    memory = AlarmMemory(Alarms())
    for _ in range(WINDOW):
        memory.check(sound(reward=0.4))
    unscored = [memory.check(sound(reward=None, unscored=1.0)) for _ in range(2 * WINDOW)]
    assert all([line.split(":")[0] for line in lines] == ["unscored"] for lines in unscored)
    assert not memory.check(sound(reward=0.4))


def test_alarms_end_a_run_after_a_checkpoint(digit_run: Tiny) -> None:
    config = digit_run("rl.alarms.action=stop", "rl.alarms.patience=2", "rl.alarms.entropy_above=0.02", "run.steps=9")
    with pytest.raises(Diverged, match="alarms in 2 rollouts in a row"):
        go(config)
    assert [row["step"] for row in read(config.run.folder, "alarms.jsonl")] == [1, 2]
    assert (config.run.folder / "checkpoints" / "step-00000002").exists()
