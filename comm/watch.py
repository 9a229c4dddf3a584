"""Deadlines that name the culprit: every wait for other ranks has one, and on expiry a roll call finds who is gone.

A collective that never ends says nothing about why: the rank that times out first is seldom the one that died. So a
thread on each rank knows what its rank waits for and watches one key of the job's store. Whoever waits too long, loses
a connection or fails, calls the roll there; each living rank's thread answers, even while the rank itself is stuck.
Then every rank raises its own CommError, or, where it cannot (it waits for a GPU, or in a destructor), its thread
prints it and ends the process. The thread never calls CUDA: a call may wait for the very device that is stuck. It costs
a store look-up per rank each half second and a few microseconds per operation. torch's own timeouts would end the job
too, but name a sequence number.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dryvine.comm.ending import Ending
from dryvine.comm.progress import Progress, StreamWords
from dryvine.comm.roll_call import SHOWN, Due, RollCall, RollCallVerdict, Wanted, topic

POLL = 0.5  # seconds between looks at the store
EXIT = 3.0  # seconds that a process gets to exit by itself once the culprit is known
STUCK = 8.0  # seconds after the deadline that the thread itself may be stuck
CODE = 86  # exit code of a process that its watch ended
Show = Callable[[BaseException], object]  # prints what ended this rank


class CommError(RuntimeError):
    """A wait for other ranks failed. The message names rank, operation, peer, bytes awaited and who is gone."""


@dataclass(eq=False)
class Awaited:
    """An operation with other ranks that this rank has posted."""

    wanted: Wanted
    due: Due
    done: Callable[[], bool]
    waited: bool = True  # whether something waits for it; before that it has no deadline
    since: float = field(default_factory=time.monotonic)

    @property
    def what(self) -> str:
        return self.wanted.what

    @property
    def age(self) -> float:
        return time.monotonic() - self.since

    def wait_from_now(self) -> None:
        self.waited, self.since = True, time.monotonic()


class Watch:
    """One per process, for as long as it talks to others. Collective: every rank of the world makes one.

    `deadline` is in seconds that an operation is waited for while no other ends: a host that queues work for a GPU may
    be a step ahead of it. `grace` is how long the roll is called. `progress` is that of this rank's GPU.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        deadline: float,
        grace: float = 2.5,
        progress: Progress | None = None,
        ending: Ending | None = None,
    ) -> None:
        self.rank, self.deadline, self.progress = rank, deadline, progress
        self.verdict: RollCallVerdict | None = None
        self._roll, self._ending = RollCall(store, rank, world, grace), ending or Ending()
        self._patience = grace + 8 * POLL  # of a rank that has the roll called
        self._open: dict[int, Awaited] = {}
        self._posted: Counter[str] = Counter()
        self._last = "nothing"  # that was posted
        self._moved = 0.0  # when an operation was last seen to end
        self._failure = ""  # why this rank ends
        self._broken: tuple[str, Due, float] | None = None  # what this rank gave up on, with its age
        self._alarm, self._known, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._raising = threading.Event()  # this rank ends by itself
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def expect(self, what: str, due: Due, done: Callable[[], bool]) -> Awaited:
        """Note an operation that begins; its deadline runs from now until `done`, which must never call CUDA. `due` has
        every rank that takes part, by what it owes."""
        self._posted[topic(what)] += 1
        self._last = what
        awaited = Awaited(Wanted(what, self._posted[topic(what)], tuple(peer for peer, _ in due)), due, done)
        self._open[id(awaited)] = awaited
        return awaited

    def over(self, awaited: Awaited) -> None:
        """Note that an operation has ended."""
        self._open.pop(id(awaited), None)
        self._moved = time.monotonic()

    def queued(self, awaited: Awaited) -> None:
        """The GPU's current stream waits for the operation; it counts as ended once the stream has passed this
        point."""
        assert self.progress is not None
        awaited.done = self.progress.mark()
        awaited.wait_from_now()

    def wait(self, awaited: Awaited, work: dist.Work) -> None:
        """Wait on a CPU until the operation is done. Raises CommError if it is late, or if another rank has found
        the job broken."""
        while not self._done(work):
            if self.verdict or self._late(awaited):
                raise self.failed(awaited.what, awaited.due, awaited.age)

    @staticmethod
    def _done(work: dist.Work) -> bool:
        try:
            work.wait(timedelta(seconds=POLL))
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait()  # it ended meanwhile, well or badly
        return True

    @contextmanager
    def breaking(self, awaited: Awaited) -> Iterator[None]:
        """Context in which an error of the transport becomes a CommError that names the culprit."""
        try:
            yield
        except CommError:
            raise
        except RuntimeError as broken:
            raise self.failed(awaited.what, awaited.due, awaited.age, broken) from broken

    def failed(self, what: str, due: Due, age: float, broken: RuntimeError | None = None) -> CommError:
        """Have the roll called. Returns the error of this rank."""
        self._broken = (what, due, age)
        self._raising.set()
        self._alarm.set()
        self._known.wait(self._patience)
        verdict = self.verdict or RollCallVerdict((), {}, "the store does not answer: its host is gone")
        return CommError(verdict.message(self.rank, what, due, age) + (f" ({_brief(broken)})" if broken else ""))

    def fail(self, error: BaseException, show: Show = traceback.print_exception) -> None:
        """This rank cannot continue: `show` why, tell the others now, who would otherwise notice at their deadline, and
        end the process."""
        show(error)
        self._raising.set()
        if not isinstance(error, CommError):
            self._failure = "failed: " + traceback.format_exception_only(error)[0].strip()
            self._alarm.set()
            self._known.wait(self._patience)
        self._ending.now(1)

    def before_exit(self, hook: Callable[[], None]) -> None:
        """See `Ending.before`."""
        self._ending.before(hook)

    def close(self) -> None:
        """Stop watching, when the ranks exit in order."""
        self._closed.set()
        self._thread.join()
        with suppress(RuntimeError):  # the store's host was faster
            self._roll.leave()

    # The thread.

    def _run(self) -> None:
        while not self._closed.wait(POLL):
            self._ending.within(self.deadline + STUCK)
            self._look()
            if self._alarm.is_set() or self._called():
                self._end()
                return
        self._ending.postpone()

    def _look(self) -> None:
        """Drop operations that are done, and raise the alarm if one is late."""
        for awaited in list(self._open.values()):
            if awaited.done():
                self.over(awaited)
        if any(self._late(awaited) for awaited in list(self._open.values())):
            self._alarm.set()

    def _late(self, awaited: Awaited) -> bool:
        return awaited.waited and time.monotonic() - max(awaited.since, self._moved) > self.deadline

    def _called(self) -> bool:
        try:
            return self._roll.called()
        except RuntimeError:  # the store's host has left; only a fault if this rank waits in vain
            return False

    def _end(self) -> None:
        """Hold the roll call and end the process, unless the main thread ends it."""
        waiting = sorted((a for a in self._open.values() if a.waited), key=lambda a: a.since)
        oldest = self._broken or next(((a.what, a.due, a.age) for a in waiting), None)
        doing = f"waiting in {oldest[0]}" if oldest else "computing"
        try:
            self.verdict = self._roll.hold(
                self._failure or doing,
                self._last,
                [awaited.wanted for awaited in waiting[:SHOWN]],
                self._posted,
            )
        except RuntimeError:
            self.verdict = RollCallVerdict((), {}, "the store does not answer: its host is gone")
        mine = self.verdict.message(self.rank, *(oldest or (self._failure or doing, (), 0.0)))
        print(mine, file=sys.stderr, flush=True)
        time.sleep(2 * POLL)  # a launcher ends all ranks when one has ended: let each speak, and read the store
        for rank in self.verdict.missing:
            with suppress(RuntimeError):
                self._roll.fence(rank)
        self._known.set()
        self._ending.within(EXIT + POLL)
        if self._raising.is_set():
            time.sleep(EXIT)
        self._ending.show()
        self._ending.now(CODE)


def _brief(broken: RuntimeError) -> str:
    """The transport's error message without its advice."""
    return str(broken).partition(". This is")[0].splitlines()[0].rpartition("] ")[2]


@contextmanager
def naming(watch: Watch | None, what: str, due: Due, on_device: bool = False) -> Iterator[None]:
    """Context for a call that returns when its operation has ended, or, with `on_device`, when the current stream
    waits for it. It gets a deadline, and an error of the transport becomes a CommError that names the culprit.
    Without a watch, torch's own error passes."""
    if watch is None:
        yield
        return
    awaited = watch.expect(what, due, lambda: False)
    with watch.breaking(awaited):
        yield
    if on_device:
        watch.queued(awaited)
    else:
        watch.over(awaited)


def watch_world(deadline: float, device: torch.device | None = None) -> Watch:
    """A watch over the default process group, on its store."""
    store: Callable[[], Any] = dist.distributed_c10d._get_default_store
    progress = StreamWords(device) if device and device.type == "cuda" else None
    return Watch(store(), dist.get_rank(), dist.get_world_size(), deadline, progress=progress)
