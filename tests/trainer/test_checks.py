"""What a host finds of a run by itself, before it meets the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
