"""A run that stopped goes on as if it had not, in the same layout to the last bit and in another to rounding."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from dryvine.comm import local
from dryvine.trainer import journal
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.data.identity import UNKNOWN
from tests.support.rig import train_on

Tiny = Callable[..., Config]
DUALPIPE = ("parallel.pp=2", "parallel.schedule=dualpipe")
TIMES = (
    "seconds",
    "checkpoint_stall_ms",
    "slowest_rank_ms",
    "tokens_per_second",
    "bubble",
    "exposed_comm_ms",
    "exposed_zero_ms",
    "exposed_comm_share",
)


def run(config: Config, interrupt_at: int | None = None) -> list[dict[str, float | None]]:
    """Train on local ranks; give the rows of metrics.jsonl without the times."""
    local.run(_rank, config.parallel.world, config, interrupt_at, deadline=100)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in journal.read(config.run.folder)]


def _rank(rank: int, config: Config, interrupt_at: int | None) -> None:
    if interrupt_at and rank == config.parallel.world - 1:
        _interrupt_after(interrupt_at)
    train_on(rank, config)


def _interrupt_after(steps: int) -> None:
    """Send this rank, and only this one, a SIGTERM in the middle of a step."""
    from dryvine.trainer import loop

    one = loop.train_step

    def step(rig, point):  # type: ignore[no-untyped-def]
        if point.step + 1 == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return one(rig, point)

    loop.train_step = step


def named(config: Config, name: str, **run: object) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name, **run})})


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_the_same_layout_resumes_bit_for_bit(tinier: Tiny, dtype: str) -> None:
    config = tinier(*DUALPIPE, f"run.dtype={dtype}")
    whole = run(named(config, "whole"))
    run(named(config, "parts", steps=3))
    assert run(named(config, "parts")) == whole
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]


def test_another_layout_resumes_to_rounding(tinier: Tiny) -> None:
    whole = run(named(tinier(*DUALPIPE), "whole"))
    run(named(tinier(*DUALPIPE), "parts", steps=3))
    moved = run(named(tinier("parallel.ep=2", "parallel.schedule=dualpipev"), "parts"))
    assert moved[:3] == whole[:3]
    for ours, theirs in zip(moved, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


@pytest.mark.long
def test_a_signal_to_one_rank_saves_and_stops_all(tinier: Tiny) -> None:
    config = tinier(*DUALPIPE)
    stopped = run(named(config, "parts"), interrupt_at=2)
    assert [row["step"] for row in stopped] == [1, 2]
    newest = run_folder.newest(named(config, "parts").run.folder)
    assert newest
    assert newest.name == "step-00000002"
    assert run(named(config, "parts")) == run(named(config, "whole"))


def test_a_half_written_checkpoint_is_never_read_and_old_ones_go(tinier: Tiny) -> None:
    config = tinier("run.checkpoint_every=1", "run.keep_checkpoints=2")
    (config.run.folder / "checkpoints" / "step-00000099.part").mkdir(parents=True)
    rows = run(config)
    assert rows[-1]["step"] == 6
    kept = sorted(p.name for p in (config.run.folder / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000005", "step-00000006"]


def test_a_run_folder_is_not_shared_by_two_models(tinier: Tiny) -> None:
    run(tinier("run.steps=1"))
    with pytest.raises(ConfigError, match=r"another \[model\] table; set run.name"):
        journal.same_run(tinier("model.layers=7"), UNKNOWN)
    journal.same_run(tinier("optim.lr=1", "run.steps=9"), UNKNOWN)


def test_the_run_folder_holds_what_it_promises(tinier: Tiny) -> None:
    config = tinier(*DUALPIPE, "run.timeline_step=2")
    run(config)
    held = {p.name.split(".")[0] + p.suffix for p in config.run.folder.iterdir()}
    promised = {
        "config.toml",
        "commit.txt",
        "metrics.jsonl",
        "loss.png",
        "schedule.svg",
        "timeline.html",
        "checkpoints",
    }
    assert promised <= held
    assert any(p.name.startswith("events.out") for p in config.run.folder.iterdir())
    assert "measured" in (config.run.folder / "timeline.html").read_text()
