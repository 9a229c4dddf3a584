"""The countdown demo in two minutes: a short warm start by a mostly wrong teacher, and a verifier that knows better."""

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
SMALL = ("model.layers=3", "model.hidden=96", "model.expert_ffn=64", "model.ffn=192")
LARGEST = 5  # number of a puzzle
WARM, MORE = 240, 90  # steps of fine-tuning; 90 read as many tokens as the reinforcement

Configs = Callable[..., Config]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Configs:
    """Of the demo's files, smaller; the warm start is done."""
    folder = tmp_path_factory.mktemp("demo")
    write(folder, 8000, 0.6, 0, LARGEST)
    tokenizer = f'chat.tokenizer="{folder}/tokenizer.json"'

    def of(name: str, *overrides: str) -> Config:
        stage = {
            "countdown_sft": (f'sft.train="{folder}/train.jsonl"', f'sft.validation="{folder}/validation.jsonl"'),
            "countdown_r1zero": (
                f'rl.task={{name="countdown", largest={LARGEST}}}', "run.steps=24", "run.eval_every=24",
                "rl.eval_problems=64", "rl.eval_samples=4", "optim.lr=4e-4",
            ),
        }[name]  # fmt: skip
        table = "sft" if name == "countdown_sft" else "rl"
        mine = (f'run.out="{folder}"', *SMALL, f"{table}.{tokenizer}", *stage)
        return load(CONFIGS / f"{name}.toml", (*mine, *overrides))

    warm = (
        f"run.steps={WARM}", "optim.lr=4e-3", "batch.sequences=4", "parallel.microbatch_sequences=4",
        'optim.plan=[{shape="linear", length=20, to=1.0}, {shape="constant", length=140, to=1.0}, '
        '{shape="cosine", length=80, to=0.1}]',
    )  # fmt: skip
    train_on(0, of("countdown_sft", *warm))
    begun = f'run.init_from="{folder}/countdown_sft"'
    # As much more of the same, at the rate that it ended with.
    more = ("optim.lr=4e-4", 'optim.plan=[{shape="constant", length=1, to=1.0}]', f"run.steps={MORE}")
    train_on(0, of("countdown_sft", *warm, *more, begun, "run.init_optimizer=true", 'run.name="control"'))
    return lambda name, *overrides: of(name, begun, *overrides)


def go(config: Config) -> list[Figures]:
    plan = make_plan(config)
    assert reinforce(plan, mesh_of(plan, torch.device("cpu")), open_sources(config))
    return read(config.run.folder)


@pytest.mark.long
def test_a_verifier_teaches_what_imitation_does_not(configs: Configs, capsys: pytest.CaptureFixture[str]) -> None:
    rows = go(configs("countdown_r1zero"))
    out = configs("countdown_sft").run.out
    control = configs("countdown_r1zero", f'run.init_from="{out}/control"', "rl.evaluate_only=true", 'run.name="none"')
    capsys.readouterr()
    plan = make_plan(control)
    assert reinforce(plan, mesh_of(plan, torch.device("cpu")), open_sources(control))
    said = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("eval_"))
    first, last = rows[0], rows[-1]
    assert last["eval_pass_1"] > max(first["eval_pass_1"], float(said["eval_pass_1"])) + 0.1
    assert last["eval_score.format"] > 0.95
    assert max(row["mismatch_k3"] for row in rows[1:]) < 1e-6
    assert max(row["unscored"] for row in rows[1:]) == 0


@pytest.mark.long
def test_a_run_that_collapses_trips_the_alarms(configs: Configs) -> None:
    """At a rate that is far too high."""
    config = configs(
        "countdown_r1zero", 'run.name="collapse"', "optim.lr=2e-2", "rl.alarms.action=stop", "run.eval_every=100",
        "run.steps=40",
    )  # fmt: skip
    with pytest.raises(Diverged, match="alarms in 3 rollouts in a row"):
        go(config)
    said = [row["alarm"] for row in read(config.run.folder, "alarms.jsonl")]
    assert any(alarm.startswith(("reward", "entropy", "zero_variance")) for alarm in said)
