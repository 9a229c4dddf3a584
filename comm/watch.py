"""Deadlines that name the culprit: every wait for other ranks has one, and on expiry a roll call finds who is gone.

A collective that never ends says nothing about why: the rank that times out first is seldom the one that died. So a
thread on each rank watches one key of the job's store. Whoever waits too long, or loses a connection, calls the roll
there; each living rank's thread answers with what its rank is doing, even while the rank itself is stuck; and who has
not answered is dead or stopped. Every rank then raises its own CommError, and a process that cannot (it waits for a
GPU, or for a destructor) is ended by a timer that needs no interpreter. It costs a store look-up per rank each half
second and nothing per collective. torch's own timeouts would end the job too, but name a sequence number.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

POLL = 0.5  # seconds between looks at the store
EXIT = 3.0  # seconds that a process gets to end by itself once the culprit is known


class CommError(RuntimeError):
    """Ranks were waited for in vain. The message names rank, operation, peer, bytes awaited and who is gone."""


Due = tuple[tuple[int, int], ...]  # (world rank, bytes that it owes)


@dataclass(frozen=True)
class Awaited:
    """What a rank waits for: an operation, and the bytes due from each world rank."""

    what: str
    due: Due
    done: Callable[[], bool]
    since: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        return time.monotonic() - self.since


class Watch:
    """One per process, for as long as it talks to others. Collective: every rank of the world makes one.

    `deadline` is in seconds from the start of an operation. `grace` is how long the roll is called.
    """

    def __init__(self, store: Any, rank: int, world: int, deadline: float, grace: float = 2.5) -> None:
        self.rank, self.world, self.deadline, self.grace = rank, world, deadline, grace
        self.verdict: Verdict | None = None
        self._store = dist.PrefixStore("watch", store.clone())  # its own connection: it may not wait for others'
        self._open: dict[int, Awaited] = {}
        self._alarm, self._known, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._store.set(f"who/{rank}", json.dumps([socket.gethostname(), os.getpid(), os.getppid()]))
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def expect(self, what: str, due: Due, done: Callable[[], bool]) -> Awaited:
        """Note an operation that has begun; its deadline runs from now, until `done`, which must never call CUDA."""
        awaited = Awaited(what, due, done)
        self._open[id(awaited)] = awaited
        return awaited

    def wait(self, awaited: Awaited, work: dist.Work) -> None:
        """Until it is done; raises CommError when it is late, or broken, or somebody else found the job broken."""
        try:
            while not self._done(work):
                if self.verdict or awaited.age > self.deadline:
                    raise self.failed(awaited.what, awaited.due, awaited.age)
        except CommError:
            raise
        except RuntimeError as broken:
            raise self.failed(awaited.what, awaited.due, awaited.age, broken) from broken
        self._open.pop(id(awaited), None)

    def close(self) -> None:
        """Stop watching; called when the ranks part in order."""
        self._closed.set()
        self._thread.join()

    @staticmethod
    def _done(work: dist.Work) -> bool:
        try:
            work.wait(timedelta(seconds=POLL))
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait()  # it ended meanwhile, well or badly
        return True

    def failed(self, what: str, due: Due, age: float, broken: RuntimeError | None = None) -> CommError:
        """Have the roll called, and give the error for this rank's part in it."""
        self._alarm.set()
        self._known.wait(self.grace + 6 * POLL)
        told = self.verdict or Verdict((), {}, "the store does not answer: its host is gone")
        return CommError(told.message(self.rank, what, due, age) + (f" ({_brief(broken)})" if broken else ""))

    # The thread.

    def _run(self) -> None:
        while not self._closed.wait(POLL):
            for key, awaited in list(self._open.items()):
                if awaited.done() and not self._alarm.is_set():
                    self._open.pop(key, None)
                elif awaited.age > self.deadline + POLL:
                    self._alarm.set()
            try:
                if self._alarm.is_set() or self._store.check(["call"]):
                    self._call_roll()
                    return
            except RuntimeError:  # the store's host has left; only a fault if somebody here is waiting
                if self._alarm.wait(self.deadline):
                    self._known.set()
                return

    def _call_roll(self) -> None:
        oldest = min(self._open.values(), key=lambda a: a.since, default=None)
        state = f"waiting in {oldest.what}" if oldest else "computing"
        self._store.set("call", "1")
        self._store.set(f"here/{self.rank}", state)
        missing, until = set(range(self.world)), time.monotonic() + self.grace
        while missing and time.monotonic() < until:
            missing = {rank for rank in missing if not self._store.check([f"here/{rank}"])}
            time.sleep(POLL / 5)
        present = [rank for rank in range(self.world) if rank not in missing]
        states = {rank: self._store.get(f"here/{rank}").decode() for rank in present}
        self.verdict = Verdict(tuple(sorted(missing)), states, "")
        doing = (oldest.what, oldest.due, oldest.age) if oldest else ("computing", (), 0.0)
        print(self.verdict.message(self.rank, *doing), file=sys.stderr, flush=True)
        time.sleep(
            2 * POLL
        )  # a launcher ends all ranks when one has ended: each must have spoken, and the store be read
        for rank in missing:
            self._fence(rank)
        faulthandler.dump_traceback_later(EXIT, exit=True)
        self._known.set()

    def _fence(self, rank: int) -> None:
        """End a sibling that is stopped (SIGSTOP): no launcher's polite signal would reach it."""
        host, pid, parent = json.loads(self._store.get(f"who/{rank}"))
        with suppress(OSError, IndexError):
            state, ppid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if host == socket.gethostname() and state == "T" and int(ppid) == parent == os.getppid():
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Verdict:
    """What the roll call found: who is missing, and what the others were doing."""

    missing: tuple[int, ...]
    states: dict[int, str]
    trouble: str

    def message(self, rank: int, what: str, due: Due, age: float) -> str:
        owing = [(peer, size) for peer, size in due if peer in self.missing] or [(p, size) for p, size in due if size]
        owed = ", ".join(f"{size} bytes from rank {peer}" for peer, size in owing[:8]) + ", ..." * (len(owing) > 8)
        late = f": {owed} did not come in {age:.1f} s" if owed else ""
        return f"rank {rank}: {what}{late}; {self._culprit(what, due)}"

    def _culprit(self, what: str, due: Due) -> str:
        if self.trouble:
            return self.trouble
        if self.missing:
            return f"rank {', '.join(map(str, self.missing))} did not answer the roll call: dead or stopped"
        late = [rank for rank, state in self.states.items() if state == "computing"]
        late += [peer for peer, size in due if size and not self.states[peer].endswith(what) and peer not in late]
        where = "; ".join(f"rank {rank} is {self.states[rank]}" for rank in late[:8])
        return "every rank is alive; " + (where or "all wait in the same operation: a slow link")


def _brief(broken: RuntimeError) -> str:
    """What the transport said, without its advice."""
    return str(broken).partition(". This is")[0].splitlines()[0].rpartition("] ")[2]


@contextmanager
def naming(watch: Watch | None, what: str, due: Due) -> Iterator[None]:
    """Around everything that posts a message or waits for one: where the transport breaks inside, raises CommError with
    the culprit's name. Without a watch torch's own error passes."""
    started = time.monotonic()
    try:
        yield
    except RuntimeError as broken:
        if watch is None:
            raise
        raise watch.failed(what, due, time.monotonic() - started, broken) from broken


def watch_world(deadline: float) -> Watch:
    """A watch over the default process group, on its store."""
    store: Callable[[], Any] = dist.distributed_c10d._get_default_store
    return Watch(store(), dist.get_rank(), dist.get_world_size(), deadline)
