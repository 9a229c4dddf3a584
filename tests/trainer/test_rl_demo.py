"""The countdown demo, smaller: a short warm start, rewards that grow by a verifier alone, and a run that collapses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dryvine.trainer.config import Config, load
from dryvine.trainer.nonfinite import Diverged
from dryvine.trainer.rig import mesh_of
from dryvine.trainer.rl.loop import reinforce
from dryvine.trainer.rl.tasks.countdown_demos import write
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.run_rows import Figures, read
from dryvine.trainer.sources import open_sources
from tests.support.rig import train_on

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = ("model.layers=3", "model.hidden=96", "model.expert_ffn=64", "model.ffn=192", "model.init_std=0.02")


@pytest.fixture(scope="module")
def reinforcement(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Its config, after a warm start that is too short for the format."""
    folder = tmp_path_factory.mktemp("demo")
    write(folder, 4000, 0.6, 0, largest=5)
    out = f'run.out="{folder}"'
    sft = (f'sft.train="{folder}/train.jsonl"', f'sft.validation="{folder}/validation.jsonl"')
    tokenizer = f'chat.tokenizer="{folder}/tokenizer.json"'
    train_on(0, load(CONFIGS / "countdown_sft.toml", (out, *SMALL, *sft, f"sft.{tokenizer}", "run.steps=60")))
    rl = (
        f"rl.{tokenizer}", f'run.init_from="{folder}/countdown_sft"', "run.steps=24", "run.eval_every=1000",
        "rl.questions=16", "rl.samples=8", "rl.eval_problems=16", "rl.eval_samples=2", "optim.lr=5e-4",
        'rl.task={name="countdown", largest=5, format_weight=1.0}',
    )  # fmt: skip
    return lambda *overrides: load(CONFIGS / "countdown_r1zero.toml", (out, *SMALL, *rl, *overrides))


def go(config: Config) -> list[Figures]:
    plan = make_plan(config)
    assert reinforce(plan, mesh_of(plan, torch.device("cpu")), open_sources(config))
    return read(config.run.folder)[1:]


@pytest.mark.long
def test_a_verifier_alone_raises_the_reward(reinforcement: Callable[..., Config]) -> None:
    """With a part of the reward for the format, which so weak a start has not learnt: in two minutes it learns no
    plans."""
    rows = go(reinforcement())
    scores = [row["score.format"] for row in rows]
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 0.1, scores
    assert max(row["mismatch_k3"] for row in rows) < 1e-6
    assert max(row["unscored"] for row in rows) == 0


@pytest.mark.long
def test_a_run_that_collapses_is_ended_by_its_alarms(reinforcement: Callable[..., Config]) -> None:
    """At a rate that is far too high."""
    config = reinforcement('run.name="collapse"', "optim.lr=5e-2", "rl.alarms.action=stop", "run.steps=40")
    with pytest.raises(Diverged, match="alarms in 3 rollouts in a row"):
        go(config)
    said = [row["alarm"] for row in read(config.run.folder, "alarms.jsonl")]
    assert any(alarm.startswith(("reward", "entropy", "zero_variance")) for alarm in said), said
