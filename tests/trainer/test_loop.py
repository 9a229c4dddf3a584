"""When the loop validates, saves and draws, and what it leaves behind in the process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from dryvine.trainer import journal, loop
from dryvine.trainer.begin import resume
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.config import Config
from dryvine.trainer.loop import Stop
from dryvine.trainer.ramps import Point
from dryvine.trainer.rig import Rig
from dryvine.trainer.step import StepOutcome, train_step
from tests.support.rig import rig_of, train_on

Tiny = Callable[..., Config]
SMALL = ("model.layers=2", "batch.sequences=2", "run.checkpoint_every=9")


def test_it_validates_the_first_and_last_step_and_every_so_many(tiny: Tiny) -> None:
    config = tiny(*SMALL, "run.steps=5", "run.eval_every=2", "run.checkpoint_every=2", "run.keep_checkpoints=9")
    train_on(0, config)
    rows = journal.read(config.run.folder)
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [1, 2, 4, 5]
    assert all(row["val_loss_ema"] is None for row in rows)
    assert [run_folder.step_of(path) for path in run_folder.complete(config.run.folder)] == [2, 4, 5]


def test_a_timeline_is_drawn_of_the_step_that_is_asked_for(tiny: Tiny) -> None:
    config, drawn = tiny(*SMALL, "run.steps=3", "run.timeline_step=2"), []

    def step(rig: Rig, point: Point) -> StepOutcome:
        drawn.append((config.run.folder / "timeline.html").exists())
        return train_step(rig, point)

    with mock.patch.object(loop, "train_step", step):
        train_on(0, config)
    assert drawn == [False, False, True]


def test_a_resumed_run_that_is_done_does_nothing_more(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(*SMALL, "run.steps=2")
    train_on(0, config)
    before = journal.read(config.run.folder)
    with mock.patch.object(loop, "train_step", mock.Mock(side_effect=AssertionError)):
        train_on(0, config)
    assert journal.read(config.run.folder) == before
    assert "after step 2" in " ".join(capsys.readouterr().out.split())


def test_a_resumed_run_publishes_the_weights_that_it_loads(tiny: Tiny) -> None:
    config = tiny(*SMALL, "run.steps=1", "optim.lr=0.1")
    train_on(0, config)
    rig, fresh = rig_of(config), rig_of(config)
    assert resume(rig, mock.Mock()) == 1
    for (name, weight), (_, initial) in zip(rig.model.named_parameters(), fresh.model.named_parameters(), strict=True):
        assert not torch.equal(weight, initial), name
    for bucket in rig.optimizer.zero.buckets:
        assert torch.equal(bucket.values[: bucket.master.numel()], bucket.master)


def test_signals_are_noted_and_their_handlers_put_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        with Stop().on_signals() as stop:
            assert not stop.asked
            os.kill(os.getpid(), number)
            assert stop.asked
    assert {number: signal.getsignal(number) for number in before} == before
