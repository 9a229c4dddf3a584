"""The countdown demo in two minutes: a short warm start, and rewards that grow by a verifier alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dryvine.trainer.config import load
from dryvine.trainer.rig import mesh_of
from dryvine.trainer.rl.loop import reinforce
from dryvine.trainer.rl.tasks.countdown_demos import write
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.run_rows import read
from dryvine.trainer.sources import open_sources
from tests.support.rig import train_on

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.long
def test_a_verifier_alone_raises_the_reward(tmp_path: Path) -> None:
    """With a part of the reward for the format, which so weak a start has not learnt: in two minutes it learns no
    arithmetic."""
    data = tmp_path / "data"
    write(data, 4000, 0.6, 0)
    out = f'run.out="{tmp_path}"'
    small = ("model.layers=3", "model.hidden=96", "model.expert_ffn=64", "model.ffn=192")
    sft = (f'sft.train="{data}/train.jsonl"', f'sft.validation="{data}/validation.jsonl"')
    tokenizer = f'chat.tokenizer="{data}/tokenizer.json"'
    train_on(0, load(CONFIGS / "countdown_sft.toml", (out, *small, *sft, f"sft.{tokenizer}", "run.steps=80")))
    rl = (
        f"rl.{tokenizer}", f'run.init_from="{tmp_path}/countdown_sft"', "run.steps=16", "run.eval_every=16",
        "rl.questions=16", "rl.samples=8", "rl.eval_problems=32", "rl.eval_samples=4", "batch.sequences=24",
        "optim.lr=5e-4", 'rl.task={name="countdown", format_weight=1.0}',
    )  # fmt: skip
    config = load(CONFIGS / "countdown_r1zero.toml", (out, *small, *rl))
    plan = make_plan(config)
    assert reinforce(plan, mesh_of(plan, torch.device("cpu")), open_sources(config))
    rows = read(config.run.folder)[1:]
    first, last = (sum(row["score.format"] for row in part) / 4 for part in (rows[:4], rows[-4:]))
    assert last > first + 0.1
    assert max(row["mismatch_k3"] for row in rows) < 1e-6
    assert max(row["unscored"] for row in rows) == 0
