"""A training step on CUDA's streams, played on the CPU: no stream reads early, writes over, or lets go too soon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from dryvine.comm.pending import Pending
from dryvine.parallel import streams
from dryvine.parallel.overlap import ORDERS
from dryvine.parallel.stage import StepResult, StreamName
from dryvine.trainer import step
from dryvine.trainer.config import Config
from dryvine.trainer.ramps import points
from dryvine.trainer.step import train_step
from tests.support.races import Races, WatchedStreams
from tests.support.rig import rig_of

Tiny = Callable[..., Config]
FP8 = ("run.dtype=bf16", "fp8.preset=deepseek_v3")
RECOMPUTE = ('model.recompute=["norm", "mla_up", "swiglu"]',)


def races(config: Config, monkeypatch: pytest.MonkeyPatch, kind: type[WatchedStreams] = WatchedStreams) -> Counter[str]:
    """What goes wrong in one training step of one rank."""
    watch = Races()
    monkeypatch.setattr(torch.cuda, "stream", watch.on)
    monkeypatch.setattr(streams, "_record", lambda stream: None)
    monkeypatch.setattr(step, "make_streams", lambda device: lambda: kind(watch))
    monkeypatch.setattr(step, "ORDERS", {"cpu": ORDERS["cuda"]})
    rig = rig_of(config)
    with watch:
        train_step(rig, next(points(config.batch, config.data.seq_len)))
    return watch.found


def alone(tiny: Tiny, schedule: str, *more: str) -> Config:
    return tiny("parallel.pp=1", "parallel.ep=1", f"parallel.schedule={schedule}", "batch.sequences=4", *more)


@pytest.mark.parametrize("ways", [("parallel.overlap=off",), ("run.dtype=bf16", *RECOMPUTE), (*FP8, *RECOMPUTE)])
def test_no_stream_races_another(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, ways: Any) -> None:
    assert not races(alone(tiny, "dualpipev", *ways), monkeypatch)


@pytest.mark.parametrize("schedule", ["zb1p", "zbv"])
def test_weight_gradients_by_themselves_race_nobody(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    assert not races(alone(tiny, schedule), monkeypatch)


def test_each_wait_gets_a_phase_of_what_w_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, ran = Races(), []
    monkeypatch.setattr(torch.cuda, "stream", watch.on)
    monkeypatch.setattr(streams, "_record", lambda stream: None)
    ours, baton = WatchedStreams(watch), streams.Baton(Pending.done(()))

    def note(name: str) -> None:
        ran.append(f"{name} in {watch.here.name}")

    def step(name: str) -> StepResult:
        note(name)
        return StepResult(Pending.done(()), [])

    for name in ("W1", "W2", "W3"):
        ours.later([partial(note, name)])
    steps: tuple[tuple[StreamName, str], ...] = (
        ("compute", "gate"), ("comm", "dispatch"), ("compute", "experts"), ("compute", "more"), ("comm", "combine"),
    )  # fmt: skip
    for stream, name in steps:
        ours.step(stream, baton, lambda _, name=name: step(name))
    ours.take(baton)
    ours.meet()
    before, after = (
        ["gate in compute", "dispatch in comm"],
        ["experts in compute", "more in compute", "combine in comm"],
    )
    assert ran == [*before, "W1 in wgrad", *after, "W2 in wgrad", "W3 in wgrad"]


class Forgetful(WatchedStreams):
    """Lets go of a backward's inputs at once."""

    def step(self, name: StreamName, baton: Any, run: Any) -> None:
        super().step(name, baton, lambda value: run(value)._replace(spent=()))


class Hasty(WatchedStreams):
    """Enters a stream without waiting for the one that has the baton."""

    def _enter(self, *_: Any) -> None:
        pass


class Early(WatchedStreams):
    """Starts weight gradients without waiting for what they multiply."""

    def _fill(self, closures: list[Any]) -> None:
        with torch.cuda.stream(self.side.wgrad):
            for closure in closures:
                closure()
        self.held.append(closures)


class InTurn(WatchedStreams):
    """Meets one stream after the other, so that comm has not met wgrad."""

    def meet(self) -> None:
        for stream in (self.side.comm, self.side.wgrad):
            self.compute.wait_stream(stream)
            stream.wait_stream(self.compute)
        self.held.clear()


@pytest.mark.parametrize(
    ("kind", "words", "ways"),
    [
        (InTurn, "comm may be given what wgrad", ()),
        (Forgetful, "may be given what compute", FP8),  # in BF16 weight gradients hold what a backward read
        (Hasty, "does not wait", ()),
        (Early, "does not wait", ()),
    ],
)
def test_what_would_race_is_found(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, kind: Any, words: str, ways: tuple[str, ...]
) -> None:
    found = races(alone(tiny, "dualpipev", *ways), monkeypatch, kind)
    assert any(words in fault for fault in found), found
