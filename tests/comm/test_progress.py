"""The watch over a GPU, by fakes that queue, run ahead and block as the real thing does: no call of the watch's thread
may touch the device, whose driver may be stuck."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dryvine.comm import progress
from dryvine.comm.posted import Posted
from dryvine.comm.progress import StreamWords
from dryvine.comm.roll_call import RollCall, RollCallVerdict, Wanted, topic
from dryvine.comm.watch import CODE, POLL, Watch, naming
from tests.support.endings import NoEnding

DEADLINE = 1.0


class Device:
    """Marks are passed in order, when `run` lets the device come further."""

    def __init__(self) -> None:
        self.queued = self.passed = 0

    def mark(self) -> Callable[[], bool]:
        self.queued += 1
        number = self.queued
        return lambda: self.passed >= number

    def run(self, marks: int = 1) -> None:
        self.passed += marks


class DeviceWork:
    """Of NCCL: `wait` queues and returns at once, and every question but that may block."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        assert timeout is None, "NCCL's wait would block the host"
        assert threading.current_thread().name != "watch"
        return True

    def is_completed(self) -> bool:
        assert threading.current_thread().name != "watch", "a call of CUDA, which may be stuck"
        return False


@pytest.fixture
def store(tmp_path: Path) -> dist.Store:
    return dist.FileStore(str(tmp_path / "store"), 1)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def watch(store: dist.Store, device: Device) -> Iterator[Watch]:
    """Of rank 0 of two; rank 1 was there, and answers no more."""
    RollCall(store, 1, 2, 0.0)
    made = Watch(store, 0, 2, DEADLINE, grace=0.3, progress=device, ending=NoEnding())
    yield made
    made.close()


def post(watch: Watch, what: str) -> Posted:
    work: Any = DeviceWork()
    return Posted(watch, what, ((1, 64),), lambda: [work], on_device=True)


def verdict(watch: Watch, seconds: float = DEADLINE + 10 * POLL) -> RollCallVerdict:
    until = time.monotonic() + seconds
    while watch.verdict is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return watch.verdict


def test_a_stream_that_waits_in_vain_is_found_and_the_process_ended(
    watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    watch.before_exit(lambda: calls.append("words fulfilled"))
    post(watch, "dispatch of layers.3").wait()
    assert verdict(watch).missing == (1,)
    ending: Any = watch._ending
    while not ending.codes:
        time.sleep(0.02)
    assert (calls, ending.codes) == (["words fulfilled"], [CODE])
    error = capsys.readouterr().err
    assert "rank 0: dispatch of layers.3: 64 bytes from rank 1 did not come in 1." in error
    assert "rank 1 did not answer the roll call: dead or stopped" in error


def test_a_host_that_runs_ahead_of_its_device_is_not_late(watch: Watch, device: Device) -> None:
    """Ten operations are queued at once and end one after the other, each in half a deadline."""
    for number in range(10):
        post(watch, f"dispatch of layers.{number}").wait()
    for _ in range(4):
        time.sleep(DEADLINE / 2)
        device.run()
    assert watch.verdict is None
    device.run(6)
    time.sleep(DEADLINE + 3 * POLL)
    assert watch.verdict is None


def test_the_first_operation_that_the_device_did_not_come_past_is_named(
    watch: Watch, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        post(watch, f"dispatch of layers.{number}").wait()
    device.run(3)
    verdict(watch)
    assert "rank 0: dispatch of layers.3: 64 bytes" in capsys.readouterr().err


def test_what_nothing_waits_for_has_no_deadline(watch: Watch, device: Device) -> None:
    early = post(watch, "receiving activations")
    time.sleep(DEADLINE + 3 * POLL)
    assert watch.verdict is None
    early.wait()  # its deadline runs from here
    time.sleep(DEADLINE / 2)
    assert watch.verdict is None
    assert verdict(watch).missing == (1,)


def test_a_post_that_blocks_is_named(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    """NCCL connects two ranks at their first message, and blocks the host until the peer does the same."""
    released = threading.Event()

    def blocked() -> list[dist.Work | None]:
        released.wait(20)
        return []

    poster = threading.Thread(target=lambda: Posted(watch, "sending to rank 1", ((1, 0),), blocked, on_device=True))
    poster.start()
    verdict(watch)
    assert "rank 0: sending to rank 1; rank 1 did not answer" in capsys.readouterr().err
    released.set()
    poster.join()


def test_a_collective_on_the_current_stream_is_watched_after_its_call_returned(watch: Watch, device: Device) -> None:
    with naming(watch, "sum of gradient norms", ((1, 8),), on_device=True):
        pass
    device.run()
    with naming(watch, "sum of expert loads", ((1, 8),), on_device=True):
        pass
    assert verdict(watch).states == {0: "waiting in sum of expert loads"}


def test_words_count_what_each_stream_came_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that writes words in each stream's order, when it gets there."""
    queues: dict[int, list[tuple[int, int]]] = {7: [], 9: []}
    current = [7]

    def write(stream: Any, address: int, value: int) -> None:
        queues[stream.cuda_stream].append((address, value))

    def reach(stream: int) -> None:
        address, value = queues[stream].pop(0)
        ctypes.c_uint32.from_address(address).value = value

    class Stream:
        def __init__(self) -> None:
            self.cuda_stream = current[0]

    monkeypatch.setattr(progress, "map_host_memory", lambda memory, owner: memory.ctypes.data)
    monkeypatch.setattr(progress, "write_value", write)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    words = StreamWords(torch.device("cuda"))
    first, second = words.mark(), words.mark()
    current[0] = 9
    other = words.mark()
    assert [done() for done in (first, second, other)] == [False, False, False]
    reach(9)
    assert [done() for done in (first, second, other)] == [False, False, True]
    reach(7)
    assert [done() for done in (first, second, other)] == [True, False, True]
    reach(7)
    assert second()
    words._marks[9] = (1, (1 << 31) - 1)  # 32 bits overflow
    ctypes.c_uint32.from_address(words._base + 4).value = (1 << 31) - 1
    over = words.mark()
    assert not over()
    reach(9)
    assert over()


def test_who_has_not_posted_its_side_is_told_from_who_waits(store: dist.Store) -> None:
    """Rank 0 waits for the second message of a name of which rank 1 has posted one, in which rank 2 has no part."""
    what = "receiving gradients of route 0, stage 1, microbatch 5"
    calls = [RollCall(store, rank, 3, 2.0) for rank in range(3)]
    posted = {topic("sending gradients of route 0, stage 1, microbatch 5 to rank 0"): 1}

    found: dict[int, RollCallVerdict] = {}

    def hold(rank: int, state: str, waiting: list[Wanted]) -> None:
        mine = Counter({topic(what): 2}) if rank == 0 else Counter(posted)
        found[rank] = calls[rank].hold(state, "x", waiting, mine)

    wanted = [Wanted(what, 2, (1,))]
    threads = [
        threading.Thread(target=hold, args=(rank, "waiting" if rank == 0 else "computing", [] if rank else wanted))
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for verdict in found.values():
        assert verdict.missing == ()
        assert verdict.owes == {1: what}
