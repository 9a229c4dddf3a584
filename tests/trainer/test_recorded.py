"""Run folders of older code: a config that would be refused today is read, and the run goes on without the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dryvine.launch.report.page import report_page
from dryvine.launch.report.runs import RunFolder
from dryvine.launch.report.watch import watch
from dryvine.trainer import journal
from dryvine.trainer.config import Config, ConfigError, dump, load, recorded
from dryvine.trainer.data.identity import UNKNOWN
from dryvine.trainer.hand_off.run_files import read_shape

Tiny = Callable[..., Config]
TRANSPOSES = '\n[model]\nrecompute = ["norm", "transposes"]\n'
RAMP = "\n[batch]\nramp_from = 8\nramp_increment = 8\nramp_tokens = 100\n"
WATCHED = "\n[run]\nspike_factor = 2.0\ntimeline_step = 1\n"


def old_run(config: Config, more: str) -> Path:
    """A folder of a run that `config` with the TOML text `more` began, before that was refused."""
    folder = config.run.folder
    folder.mkdir(parents=True)
    table = more.split()[0]
    begun = dump(config).replace(f"{table}\n", f"{more.strip()}\n", 1)
    begun = begun.replace("recompute = []\n", "") if "recompute" in more else begun
    begun = begun.replace("ramp_increment = 1\n", "") if "ramp_from" in more else begun
    (folder / "config.toml").write_text(begun)
    figures = {"step": 1, "tokens": 512, "loss": 5.0, "val_loss": None, "lr": 1e-3, "grad_norm": 1.0, "seconds": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(figures) + "\n")
    return folder


@pytest.mark.parametrize(
    ("made", "more", "refused"),
    [("tiny", TRANSPOSES, "'transposes'"), ("digit_run", RAMP, "batch.ramp_from"), ("digit_run", WATCHED, "spike_")],
)
def test_a_run_of_before_a_refusal_is_read_and_goes_on(
    made: str, more: str, refused: str, request: pytest.FixtureRequest
) -> None:
    config: Config = request.getfixturevalue(made)('run.name="old"')
    folder = old_run(config, more)
    with pytest.raises(ConfigError, match=refused):
        load(folder / "config.toml")
    assert recorded(folder) != config, "the key is there"
    shown = StringIO()
    watch(folder, Console(file=shown), every=0.0, once=True)
    assert "step 1 of" in shown.getvalue()
    assert "old" in report_page([RunFolder.open(folder)])
    journal.plot(folder)
    assert (folder / "loss.png").exists()
    assert read_shape(folder).layers == config.model.layers
    journal.same_run(config, UNKNOWN)
