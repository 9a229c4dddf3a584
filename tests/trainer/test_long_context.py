"""The long-context stage: with YaRN and longer sequences a run keeps the loss that it had at old positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dryvine.trainer.begin import resume
from dryvine.trainer.config import Config, load
from dryvine.trainer.step import evaluate
from tests.support.rig import rig_of, train_on

Tiny = Callable[..., Config]
CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = ("model.layers=2", "model.hidden=64", "model.bias_gamma=0", "model.balance_alpha=0", "run.eval_batches=8")
# A step in one microbatch, and nothing beside the steps: a tenth of the time.
QUICK = ("parallel.microbatch_sequences=16", "run.eval_every=1000", "run.checkpoint_every=1000")
RUN = (*MODEL, *QUICK)
YARN = ("model.max_position=128", "model.yarn={ factor = 4.0, original = 32 }")
CONSTANT = 'optim.plan=[{ shape = "constant", length = 1000, to = 1.0 }]'


def validation_loss(config: Config) -> float:
    """Of the weights that `run.init_from` names."""
    rig = rig_of(config)
    resume(rig, Console(quiet=True))
    return evaluate(rig).loss


@pytest.mark.long
def test_a_longer_context_keeps_the_loss_at_old_positions(tiny: Tiny) -> None:
    first = tiny(*RUN, "run.name=first", "run.steps=240", "optim.lr=3e-3", CONSTANT)
    train_on(0, first)

    def loss_of(weights: Config, *changes: str) -> float:
        return validation_loss(tiny(*RUN, f'run.init_from="{weights.run.folder}"', "run.name=asked", *changes))

    start = f'run.init_from="{first.run.folder}"'
    # As many tokens a step.
    longer = ("data.seq_len=128", "batch.sequences=4", "parallel.microbatch_sequences=4")
    second = tiny(*RUN, *YARN, *longer, "run.name=second", "run.steps=40", "optim.lr=3e-4", CONSTANT, start)
    train_on(0, second)
    before = loss_of(first)
    at_once, after = loss_of(first, *YARN), loss_of(second, *YARN)
    untrained, far = loss_of(first, *YARN, *longer), loss_of(second, *YARN, *longer)
    assert before < 4.5  # of ln 320 = 5.8: it has learned something that could be lost
    assert after < before * 1.005
    assert at_once < before * 1.05
    assert far < untrained


@pytest.mark.parametrize(("name", "tokens"), [("moe_1b_32k", 32768), ("moe_1b_128k", 131072)])
def test_stages_of_a_config_differ_from_the_run_before_as_v3s_do(name: str, tokens: int) -> None:
    """One YaRN for both stages, as many tokens a step as before, 1000 steps, at the learning rate of the end."""
    first, stage = load(CONFIGS / "moe_1b.toml"), load(CONFIGS / f"{name}.toml")
    assert stage.data.seq_len == tokens
    assert stage.model.yarn
    assert stage.model.yarn.original == first.model.max_position
    assert stage.model.yarn.factor * stage.model.yarn.original == stage.model.max_position == 131072
    assert stage.batch.sequences * tokens == first.batch.sequences * first.data.seq_len
    assert stage.run.steps == 1000
    assert stage.optim.lr == pytest.approx(first.optim.lr * first.optim.plan[-1].to)
    same = {"max_position", "yarn", "recompute"}
    assert stage.model.model_dump(exclude=same) == first.model.model_dump(exclude=same)
