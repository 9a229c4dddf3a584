"""The deadline by itself: who notices it, and what is said of whom. `test_faults.py` has whole jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.posted import Posted
from dryvine.comm.roll_call import RollCall, RollCallVerdict
from dryvine.comm.watch import POLL, CommError, Watch, naming
from tests.support.endings import NoEnding

DEADLINE = 0.8


class Endless:
    """A Work that never completes; its wait returns at once if there is no timeout, as a GPU's does."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        if timeout is not None:
            time.sleep(timeout.total_seconds())
            raise RuntimeError("timed out")
        return True

    def is_completed(self) -> bool:
        return False


class Finished(Endless):
    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class Broken(Finished):
    def wait(self, timeout: timedelta | None = None) -> bool:
        raise RuntimeError("[pair.cc:1] Connection closed by peer")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Watch]:
    """The watch of rank 0 of two; rank 1 was there, and answers no more."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    RollCall(store, 1, 2, 0.0)
    watch = Watch(store, 0, 2, DEADLINE, grace=0.3, ending=NoEnding())
    yield watch
    watch.close()


def test_the_thread_keeps_the_deadline_where_no_host_waits(pair: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    pair.expect("dispatch of layers.3", ((1, 64),), lambda: False)
    time.sleep(DEADLINE / 2)
    assert pair.verdict is None
    until = time.monotonic() + DEADLINE + 10 * POLL
    while pair.verdict is None and time.monotonic() < until:
        time.sleep(0.05)
    assert pair.verdict is not None
    assert pair.verdict.missing == (1,)
    assert "rank 0: dispatch of layers.3: 64 bytes from rank 1 did not come" in capsys.readouterr().err


def test_the_host_keeps_the_deadline_without_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "_run", lambda self: None)
    watch = Watch(dist.FileStore(str(tmp_path / "store"), 1), 0, 2, DEADLINE, grace=0.0, ending=NoEnding())
    work: Any = Endless()
    began = time.monotonic()
    with pytest.raises(CommError, match=r"combine of layers\.3: 64 bytes from rank 1 .*the store does not answer"):
        watch.wait(watch.expect("combine of layers.3", ((1, 64),), work.is_completed), work)
    assert DEADLINE < time.monotonic() - began < DEADLINE + 10 * POLL


def test_what_ends_in_time_is_forgotten(pair: Watch) -> None:
    done: Any = Finished()
    awaited = pair.expect("dispatch", (), lambda: False)
    pair.wait(awaited, done)
    pair.over(awaited)
    pair.expect("combine", (), done.is_completed)
    time.sleep(DEADLINE + 3 * POLL)
    assert pair.verdict is None


def test_what_breaks_is_named_before_the_deadline(pair: Watch) -> None:
    work: Any = Broken()
    with pytest.raises(CommError, match=r"rank 1 did not answer the roll call.* \(Connection closed by peer\)"):
        Posted(pair, "dispatch", ((1, 8),), lambda: [work], on_device=False).wait(whole=False)


def test_a_broken_post_is_named_only_where_somebody_watches(pair: Watch) -> None:
    with pytest.raises(RuntimeError, match=r"^closed$") as plain, naming(None, "sending", ()):
        raise RuntimeError("closed")
    assert not isinstance(plain.value, CommError)
    with pytest.raises(CommError, match="rank 0: sending; rank 1 did not answer"), naming(pair, "sending", ()):
        raise RuntimeError("closed")


def test_an_exchange_awaits_what_it_receives(pair: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven routing: bytes due are those of the rows to come, not of those sent, by world rank and without our own."""
    noted = []

    def refuse(*args: Any, **more: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    def failed(what: str, due: Any, age: float, broken: RuntimeError) -> CommError:
        noted.append((what, due))
        return CommError(what)

    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 6, 7])
    monkeypatch.setattr(dist, "all_to_all_single", refuse)
    monkeypatch.setattr(pair, "failed", failed)
    group: Any = SimpleNamespace(size=lambda: 3, rank=lambda: 1)
    with pytest.raises(CommError):
        GroupExchange(group, watch=pair).start(torch.ones(6, 2), [1, 2, 3], [5, 2, 0], what="dispatch")
    assert noted == [("dispatch", ((4, 40), (7, 0)))]


def verdict(missing: tuple[int, ...], **states: str) -> RollCallVerdict:
    return RollCallVerdict(missing, {int(rank[1:]): state for rank, state in states.items()}, "")


def test_a_message_names_who_is_gone_before_who_is_late() -> None:
    due = ((1, 10), (2, 20), (3, 0))
    gone = verdict((2,), r0="waiting in x", r1="waiting in x", r3="computing").message(0, "x", due, 1.5)
    assert gone == (
        "rank 0: x: 20 bytes from rank 2 did not come in 1.5 s; rank 2 did not answer the roll call: dead or stopped"
    )
    alive = verdict((), r0="waiting in x", r1="waiting in y", r2="waiting in x", r3="computing").message(0, "x", due, 2)
    assert "10 bytes from rank 1, 20 bytes from rank 2 did not come in 2.0 s" in alive
    assert alive.endswith("every rank is alive; rank 3 is computing; rank 1 is waiting in y")
    slow = verdict((), r0="waiting in x", r1="waiting in x").message(0, "x", ((1, 10),), 2)
    assert slow.endswith("every rank is alive; all wait in the same operation: a slow link")
