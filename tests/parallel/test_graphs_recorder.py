"""What records CUDA graphs, over stand-ins of torch's graphs and streams: parts, and errors in the middle of one."""

from __future__ import annotations

import gc
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dryvine.comm.live_steps import LiveStep, LiveSteps
from dryvine.parallel.graphs import CudaRecorder

Done = list[str]


class FakeGraph:
    """Notes what is done. Once something has failed while it was recorded, CUDA refuses to end it."""

    broken = empty = False

    def __init__(self, done: Done) -> None:
        self.done = done

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.done.append("begin")

    def capture_end(self) -> None:
        self.done.append("end")
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if self.empty:
            warnings.warn("The CUDA Graph is empty.", stacklevel=1)

    def replay(self) -> None:
        self.done.append("replay")


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Done:
    seen: Done = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(seen))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return seen


def recorder(live: LiveSteps) -> CudaRecorder:
    return CudaRecorder(torch.device("cuda"), live)


def test_a_live_step_is_between_two_graphs(done: Done) -> None:
    live = LiveSteps()

    def run() -> int:
        live.run(LiveStep(lambda: done.append("message")))
        return 7

    steps, made = recorder(live).record(run, (0, 0))
    assert (made, done) == (7, ["begin", "end", "begin", "end"])
    done.clear()
    for step in steps:
        step.run()
    assert done == ["replay", "message", "replay"]


def test_graphs_without_a_launch_are_not_replayed(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGraph, "empty", True)
    live = LiveSteps()
    steps, _ = recorder(live).record(lambda: live.run(LiveStep(lambda: done.append("message"))), (0, 0))
    assert len(steps) == 1


@pytest.mark.parametrize("after", [0, 1])
def test_an_error_while_recording_is_the_one_that_is_raised(
    done: Done, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Its first line is what other ranks hear; CUDA's, which follows, says nothing. Nothing stays as recording needs
    it."""
    monkeypatch.setattr(FakeGraph, "broken", True)
    live = LiveSteps()

    def run() -> None:
        if after:
            monkeypatch.setattr(FakeGraph, "broken", False)
            live.run(LiveStep(lambda: None))
            monkeypatch.setattr(FakeGraph, "broken", True)
        raise torch.OutOfMemoryError("no room for 7 GB")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        recorder(live).record(run, (0, 0))
    assert done.count("begin") == done.count("end") == after + 1
    assert gc.isenabled()
    assert not live.recording
    assert torch.autograd.is_multithreading_enabled()


def test_a_part_that_cannot_begin_is_told(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveSteps()

    def refuse(self: FakeGraph, pool: Any, capture_error_mode: str) -> None:
        raise RuntimeError("another thread records")

    def run() -> None:
        monkeypatch.setattr(FakeGraph, "capture_begin", refuse)
        live.run(LiveStep(lambda: None))

    with pytest.raises(RuntimeError, match="another thread"):
        recorder(live).record(run, (0, 0))
    assert gc.isenabled()
