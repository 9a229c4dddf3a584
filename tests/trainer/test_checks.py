"""What a host finds of a run by itself, before it meets the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dryvine.trainer import wandb_board
from dryvine.trainer.checks import open_checked
from dryvine.trainer.config import RECORDED, Config, ConfigError, dump
from dryvine.trainer.fp8 import choose
from dryvine.trainer.fp8.choose import CannotRun, check_engine
from dryvine.trainer.fp8.engines.emulate import Emulate
from dryvine.trainer.fp8.recipe import preset

CPU = torch.device("cpu")


class Broken(Emulate):
    """It says that it can run here, and cannot."""

    def product(self, *_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor execution on the device")


class Wrong(Emulate):
    """Of an older package: other scales."""

    def wgrad(self, a: object, b: object, groups: object, total: Tensor) -> None:
        total += 1.0


@pytest.mark.parametrize(
    ("engine", "why"),
    [(Broken(), "RuntimeError: no kernel image is available"), (Wrong(), r"its weight gradients are [\d.]+% off")],
)
def test_an_engine_asked_for_by_name_is_tried_before_a_run_begins(
    monkeypatch: pytest.MonkeyPatch, engine: Emulate, why: str
) -> None:
    monkeypatch.setattr(choose, "make_engine", lambda _: engine)
    with pytest.raises(CannotRun, match=rf"^fp8.gemm = 'triton' fails on cpu: {why}; 'auto' takes one that does not$"):
        check_engine(preset("deepseek_v3", gemm="triton"), CPU)


def test_an_engine_that_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "make_engine", lambda _: Emulate())
    check_engine(preset("deepseek_v3", gemm="triton"), CPU)


def test_a_run_that_would_fail_later_is_refused_before_it_begins(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_checked(tiny(), CPU, verifies=True)
    monkeypatch.setattr(wandb_board, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"run\.wandb: the package wandb is not installed"):
        open_checked(tiny("run.wandb=mine"), CPU, verifies=True)
    folder = tiny().run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORDED).write_text(dump(tiny("model.ffn=40")))
    with pytest.raises(ConfigError, match=r"holds a run with another \[model\] table"):
        open_checked(tiny(), CPU, verifies=True)
