"""Weights & Biases: refused where it is asked for and missing, given every figure where it is there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dryvine.trainer import wandb_board
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.wandb_board import WandbBoard, check_wandb


def test_it_is_refused_where_it_is_missing(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_board, "find_spec", lambda name: None)
    check_wandb(tiny())
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_wandb(tiny("run.wandb=mine"))


def test_figures_go_to_the_run_of_that_name(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    run = SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("finished"))
    began: dict[str, Any] = {}
    module = SimpleNamespace(init=lambda **words: began.update(words) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    board = WandbBoard(tiny("run.wandb=mine"))
    board.write(3, {"loss": 2.5, "val_loss": None})
    board.close()
    assert (began["project"], began["id"], began["resume"]) == ("mine", "tiny", "allow")
    assert logged == [(3, {"loss": 2.5}), "finished"]
