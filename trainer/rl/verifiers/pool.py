"""Processes that score answers, each under a wall clock: what hangs, grows or dies costs one verdict, never the run.

Signals and threads cannot do this: an alarm cannot be set off the main thread, where libraries then drop their timeouts
or score every answer 0, and a loop in C holds the interpreter whatever the thread. Processes can be killed. They are
started by `subprocess` and not forked, since the trainer has threads, a CUDA context and memory that no child should
see.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import IO, NamedTuple

from dryvine.trainer.rl.verifiers.names import VERIFIERS
from dryvine.trainer.rl.verifiers.sandbox import UNCONTAINED
from dryvine.trainer.rl.verifiers.verdict import Job, Verdict
from dryvine.trainer.rl.verifiers.worker import WorkerLimits

START_SECONDS = 120.0  # to import the verifiers on a busy machine
STARTS = 3  # of one worker in a row that may fail before the pool gives up
REPLY_LONGEST = 1 << 16  # bytes of a reply; more is no verdict
LOOK_SECONDS = 0.002  # between two looks at the processes while jobs are added
GIVEN_BYTES = 4096  # of the jobs that a process is given at once: a pipe takes them without waiting for it


class VerifierError(Exception):
    """A verifier that does not exist or cannot work on this machine: one line, with the fix."""


class _QueuedJob(NamedTuple):
    """A job on its way."""

    line: bytes  # what a process reads
    seconds: float  # that it may take
    settle: Callable[[Verdict], None]


@dataclass(eq=False)
class _Process:
    """A worker. `given` are the jobs that it has not answered yet: it works at the first, whose deadline, or that of
    its start, is `until`."""

    popen: subprocess.Popen[bytes]
    jobs: IO[bytes]
    replies: IO[bytes]
    until: float
    ready: bool = False
    given: deque[_QueuedJob] = field(default_factory=deque)
    text: bytearray = field(default_factory=bytearray)

    @property
    def busy(self) -> bool:
        return not self.ready or bool(self.given)


class Pool:
    """`workers` processes that have loaded the verifiers `names`; by default one for each two cores, 2 to 8. Raises
    VerifierError where one cannot be loaded.

    Use it as a context manager, or call `close`. Processes are started at once and again after each kill.
    """

    def __init__(self, names: Iterable[str], workers: int | None = None, limits: WorkerLimits | None = None) -> None:
        self.names = sorted(set(names))
        if unknown := [name for name in self.names if name not in VERIFIERS]:
            raise VerifierError(f"no verifier {unknown[0]!r}: there are {', '.join(sorted(VERIFIERS))}")
        self.limits = limits or WorkerLimits()
        self.seconds: dict[str, float] = {}
        self._failed_starts = 0
        self._waiting: deque[_QueuedJob] = deque()
        self._selector = selectors.DefaultSelector()
        workers = workers or min(8, max(2, (os.cpu_count() or 2) // 2))
        self._processes = [self._start() for _ in range(workers)]
        try:
            while not all(process.ready for process in self._processes):
                self.step(wait=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all processes."""
        for process in self._processes:
            self._kill(process)
        self._processes.clear()
        self._selector.close()

    def score(self, jobs: Iterable[Job]) -> list[Verdict]:
        """A verdict for each job, in order. Takes no longer than the deadlines of the jobs allow."""
        marking = Marking(self)
        for job in jobs:
            marking.add(job)
        return marking.verdicts()

    def ask(self, job: Job, settle: Callable[[Verdict], None]) -> None:
        """Queue a job; `settle` is called with its verdict in a later `step`."""
        line = json.dumps({"verifier": job.verifier, "answer": job.answer, "problem": dict(job.problem)})
        self._waiting.append(_QueuedJob(line.encode() + b"\n", self.seconds[job.verifier], settle))

    def forget(self) -> None:
        """Drop the jobs that no process has yet."""
        self._waiting.clear()

    def step(self, wait: bool) -> None:
        """Give idle workers jobs, and see which of the others reply, die or are out of time; `wait` until one does."""
        for process in [process for process in self._processes if not process.busy]:
            if self._waiting and process.popen.poll() is None:
                self._give(process)
            elif self._waiting:
                self._lost(process, "ended")
        left = min((process.until for process in self._processes if process.busy), default=0.0) - time.monotonic()
        spoke = [key.data for key, _ in self._selector.select(max(0.0, left) if wait else 0.0)]
        for process in spoke:
            self._read(process)
        for process in list(self._processes):
            if process.busy and process not in spoke and time.monotonic() > process.until:
                self._lost(process, "ran past its deadline")

    def _give(self, process: _Process) -> None:
        """Many jobs at once, whose share of a read and a write is small beside a quick verifier; but a part of what
        waits, so that all have something to do until the end."""
        most, size = max(1, len(self._waiting) // (2 * len(self._processes))), 0
        while self._waiting and len(process.given) < most:
            size += len(self._waiting[0].line)
            if process.given and size > GIVEN_BYTES:
                break
            process.given.append(self._waiting.popleft())
        self._begin_next(process)
        with suppress(OSError):  # it is dead, and the next read says so
            process.jobs.write(b"".join(asked.line for asked in process.given))
            process.jobs.flush()

    def _begin_next(self, process: _Process) -> None:
        if process.given:
            process.until = time.monotonic() + process.given[0].seconds

    def _read(self, process: _Process) -> None:
        part = os.read(process.replies.fileno(), REPLY_LONGEST)
        process.text += part
        *lines, rest = bytes(process.text).split(b"\n")
        if not part or len(rest) > REPLY_LONGEST or not all(self._take(process, line) for line in lines):
            self._lost(process, "gave a reply that is no verdict" if part else "ended")
        else:
            process.text = bytearray(rest)

    def _take(self, process: _Process, line: bytes) -> bool:
        """Whether it is the reply that was to come."""
        try:
            reply = json.loads(line)
            if not process.ready:
                self._started(process, reply)
                return True
            verdict = _verdict(reply["score"], str(reply["why"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # whatever bytes there are
            return False
        if not process.given:
            return False
        process.given.popleft().settle(verdict)
        self._begin_next(process)
        return True

    def _started(self, process: _Process, reply: Mapping[str, object]) -> None:
        if "error" in reply:
            raise VerifierError(str(reply["error"]))
        self.seconds = {name: float(str(reply[name])) for name in self.names}
        process.ready, self._failed_starts = True, 0

    def _lost(self, process: _Process, how: str) -> None:
        """Kill the process, whose job cannot be scored, and start another in its place. Jobs behind that one wait
        again."""
        self._kill(process)
        if process.given:
            process.given.popleft().settle(Verdict(None, f"the verifier's process {how}"))
            self._waiting.extendleft(reversed(process.given))
        elif not process.ready:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                raise VerifierError(f"processes of verifiers {', '.join(self.names)} do not start: {how}")
        self._processes[self._processes.index(process)] = self._start()

    def _start(self) -> _Process:
        words = [sys.executable, "-m", "dryvine.trainer.rl.verifiers.worker"]
        words += [json.dumps({name: VERIFIERS[name] for name in self.names}), json.dumps(asdict(self.limits))]
        popen = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=_environment()
        )
        assert popen.stdin
        assert popen.stdout
        process = _Process(popen, popen.stdin, popen.stdout, time.monotonic() + START_SECONDS)
        self._selector.register(process.replies, selectors.EVENT_READ, process)
        return process

    def _kill(self, process: _Process) -> None:
        self._selector.unregister(process.replies)
        _kill(process)


class Marking:
    """Jobs that are scored while more of them are added. A pool has one marking at a time: a new one drops what waits
    of the one before, which was given up."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._verdicts: list[Verdict | None] = []
        self._left = 0
        self._looked = 0.0
        pool.forget()

    def add(self, job: Job) -> None:
        """Returns at once."""
        number, longest = len(self._verdicts), self._pool.limits.answer_chars
        self._verdicts.append(None)
        self._left += 1
        if len(job.answer) > longest:
            return self._settle(number, Verdict(0.0, f"longer than {longest} characters"))
        self._pool.ask(job, partial(self._settle, number))
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._pool.step(wait=False)
            self._looked = time.monotonic()

    def _settle(self, number: int, verdict: Verdict) -> None:
        self._verdicts[number] = verdict
        self._left -= 1

    def verdicts(self) -> list[Verdict]:
        """Those of all jobs, in the order in which they were added. Waits no longer than their deadlines allow."""
        while self._left:
            self._pool.step(wait=True)
        return [verdict for verdict in self._verdicts if verdict is not None]


def _verdict(score: object, why: str) -> Verdict:
    if score is None:
        return Verdict(None, why)
    if not isinstance(score, int | float) or not math.isfinite(score):
        return Verdict(None, f"the verifier's score was {score!r}")
    return Verdict(float(score), why)


def _environment() -> dict[str, str]:
    """The environment of a worker: the variables that Python needs, and none of the user's tokens or keys."""
    kept = {
        name: os.environ[name]
        for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR", UNCONTAINED)
        if name in os.environ
    }
    return kept | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def _kill(process: _Process) -> None:
    """It and its process group. Sandboxes die with it by themselves."""
    if process.popen.returncode is None:  # once it is reaped its number may be another's
        os.killpg(process.popen.pid, signal.SIGKILL)
    process.popen.wait()
    process.replies.close()
    with suppress(OSError):  # what was not written yet
        process.jobs.close()
