"""A run that begins from another: which state it takes, what it says and refuses; and plans by tokens in a step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from dryvine.trainer.begin import check_source, differences
from dryvine.trainer.checkpoint.manifest import CheckpointError
from dryvine.trainer.checkpoint.reader import open_checkpoint, whole
from dryvine.trainer.config import Config, dump, load
from dryvine.trainer.ramps import points
from dryvine.trainer.step import train_step
from tests.support.rig import rig_of, train_on

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
Tiny = Callable[..., Config]
SMALL = ("model.layers=2", "batch.sequences=4", "run.checkpoint_every=9", "optim.lr=0.01", "optim.ema=0.5")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def first(tiny: Tiny) -> Config:
    """Trained two steps."""
    config = tiny(*SMALL, "run.name=first", "run.steps=2")
    train_on(0, config)
    return config


@pytest.mark.parametrize("everything", [False, True])
def test_a_run_begins_from_another(
    tiny: Tiny, first: Config, capsys: pytest.CaptureFixture[str], everything: bool
) -> None:
    """Its step 0 has the other's weights, and its moments only if asked; data and schedule begin anew."""
    second = ("run.name=second", f'run.init_from="{first.run.folder}"', f"run.init_optimizer={str(everything).lower()}")
    config = tiny(*SMALL, *second, "data.seq_len=16", "run.steps=1", "optim.lr=1e-9")
    stored = open_checkpoint(first.run.folder)
    train_on(0, config)
    text = said(capsys)
    assert f"begins with the {'weights and optimizer' if everything else 'weights'} of " in text
    assert "after 2 steps" in text
    assert "data.seq_len: 32 -> 16" in text
    assert "run.name" not in text
    after = open_checkpoint(config.run.folder)
    assert after.manifest.step == 1
    for name in after.manifest.parameters:
        torch.testing.assert_close(whole(after, name), whole(stored, name), rtol=0, atol=1e-6)
        assert float(whole(after, name, "step")) == (3 if everything else 1)
    average, weights = whole(after, "embed.weight", "ema"), whole(stored, "embed.weight")
    assert torch.allclose(average, weights, atol=1e-6) is not everything


def test_a_run_that_has_begun_goes_on_by_itself(tiny: Tiny, first: Config, capsys: pytest.CaptureFixture[str]) -> None:
    second = (*SMALL, "run.name=second", f'run.init_from="{first.run.folder}"')
    train_on(0, tiny(*second, "run.steps=1"))
    said(capsys)
    train_on(0, tiny(*second, "run.steps=2"))
    text = said(capsys)
    assert "begins with" not in text
    assert "after step 1" in text


def test_what_cannot_be_begun_from_is_refused(tiny: Tiny, first: Config, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run\.init_from: .*nowhere: no such folder"):
        check_source(tiny(f'run.init_from="{tmp_path / "nowhere"}"'))
    with pytest.raises(CheckpointError, match="no checkpoint here; name a run folder or one of its checkpoints"):
        check_source(tiny(f'run.init_from="{tmp_path}"'))
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match="no checkpoint here; `dryvine import` makes one of it"):
        check_source(tiny(f'run.init_from="{tmp_path}"'))
    other = tiny(*SMALL, "model.ffn=40", "run.name=second", f'run.init_from="{first.run.folder}"')
    with pytest.raises(CheckpointError, match=r"layers.0.ffn.*run.init_from needs a checkpoint of this \[model\]"):
        train_on(0, other)


def test_the_differences_are_those_of_the_whole_config(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(dump(tiny("optim.ema=0.5")))
    lines = list(differences(path, tiny("run.name=other", "batch.sequences=8", "model.yarn={ factor = 2.0 }")))
    assert lines == [
        "batch.sequences: 16 -> 8",
        "model.yarn.alpha: not set -> 1.0",
        "model.yarn.beta: not set -> 32.0",
        "model.yarn.factor: not set -> 2.0",
        "model.yarn.mscale: not set -> 1.0",
        "model.yarn.mscale_all_dim: not set -> 1.0",
        "model.yarn.original: not set -> 4096",
        "optim.ema: 0.5 -> 0.0",
    ]
    path.write_text(dump(load(CONFIGS / "countdown_sft.toml")))
    rl = CONFIGS / "countdown_r1zero.toml"
    tables = [line for line in differences(path, load(rl)) if "set" in line or "chat" in line]
    assert tables == ["[rl]: not set -> set", "[sft]: set -> not set"], "and not every key of them"
    lines = list(differences(path, load(rl, ('rl.chat.roles.user="{content}"',))))
    assert "chat.roles.user: <|User|>{content}<|Assistant|> -> {content}" in lines
    assert next(differences(tmp_path / "none.toml", tiny())).endswith("differences in the config are not known")


def test_plans_by_tokens_change_a_step_when_they_say(tiny: Tiny) -> None:
    """A step of 4 sequences has 128 tokens: the third is the first to begin after 200 or more."""
    late = ("optim.mtp_weight_plan=[{ after = 200, to = 0.0 }]", "optim.bias_gamma_plan=[{ after = 200, to = 0.0 }]")
    rig = rig_of(tiny(*SMALL, *late, "model.mtp_weight=0.5"))
    weighted, biases = [], []
    for point in islice(points(rig.config.batch, rig.config.data.seq_len), 3):
        played = train_step(rig, point).played
        weighted.append(float(torch.stack(played.losses["mtp.0"]).sum()))
        biases.append({name: bias.clone() for name, bias in rig.model.buffers.items()})
    assert weighted[0] > 1
    assert weighted[1] > 1
    assert weighted[2] == 0
    assert any(not torch.equal(biases[0][name], biases[1][name]) for name in biases[0])
    assert all(torch.equal(biases[1][name], biases[2][name]) for name in biases[0])
