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
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import IO

from dryvine.trainer.rl.verifiers.names import VERIFIERS
from dryvine.trainer.rl.verifiers.sandbox import UNCONTAINED
from dryvine.trainer.rl.verifiers.verdict import Job, Verdict
from dryvine.trainer.rl.verifiers.worker import WorkerLimits

START_SECONDS = 120.0  # to import the verifiers on a busy machine
STARTS = 3  # of one worker in a row that may fail before the pool gives up
REPLY_LONGEST = 1 << 16  # bytes of a reply; more is no verdict


class VerifierError(Exception):
    """A verifier that does not exist or cannot work on this machine: one line, with the fix."""


@dataclass(eq=False)
class _Process:
    """A worker. `job` is the index of what it works at, None while it is idle or starts; `until` its deadline."""

    popen: subprocess.Popen[bytes]
    jobs: IO[bytes]
    replies: IO[bytes]
    until: float
    ready: bool = False
    job: int | None = None
    text: bytearray = field(default_factory=bytearray)


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
        workers = workers or min(8, max(2, (os.cpu_count() or 2) // 2))
        self._processes = [self._start() for _ in range(workers)]
        try:
            while not all(process.ready for process in self._processes):
                self._step([], deque(), {})
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
            _kill(process)
        self._processes.clear()

    def score(self, jobs: Sequence[Job]) -> list[Verdict]:
        """A verdict for each job, in order. Takes no longer than the deadlines of the jobs allow."""
        longest = self.limits.answer_chars
        done = {
            index: Verdict(0.0, f"longer than {longest} characters")
            for index, job in enumerate(jobs)
            if len(job.answer) > longest
        }
        waiting = deque(index for index in range(len(jobs)) if index not in done)
        while len(done) < len(jobs):
            self._step(jobs, waiting, done)
        return [done[index] for index in range(len(jobs))]

    def _step(self, jobs: Sequence[Job], waiting: deque[int], done: dict[int, Verdict]) -> None:
        """Give idle workers jobs, and wait until one of them replies, dies or is out of time."""
        for process in list(self._processes):
            if waiting and process.ready and process.job is None:
                if process.popen.poll() is None:
                    self._give(process, waiting.popleft(), jobs)
                else:
                    self._lost(process, waiting, done, "ended")
        busy = [process for process in self._processes if not process.ready or process.job is not None]
        with selectors.DefaultSelector() as selector:
            for process in busy:
                selector.register(process.replies, selectors.EVENT_READ)
            left = min(process.until for process in busy) - time.monotonic()
            spoke = {key.fileobj for key, _ in selector.select(max(0.0, left))}
        for process in busy:
            if process.replies in spoke:
                self._read(process, waiting, done)
            elif time.monotonic() > process.until:
                self._lost(process, waiting, done, "ran past its deadline")

    def _give(self, process: _Process, index: int, jobs: Sequence[Job]) -> None:
        job = jobs[index]
        process.job, process.until = index, time.monotonic() + self.seconds[job.verifier]
        line = json.dumps({"verifier": job.verifier, "answer": job.answer, "problem": dict(job.problem)})
        with suppress(OSError):  # it is dead, and the next read says so
            process.jobs.write(line.encode() + b"\n")
            process.jobs.flush()

    def _read(self, process: _Process, waiting: deque[int], done: dict[int, Verdict]) -> None:
        part = os.read(process.replies.fileno(), REPLY_LONGEST)
        process.text += part
        line, ended, rest = bytes(process.text).partition(b"\n")
        if not part or len(process.text) > REPLY_LONGEST or rest:
            self._lost(process, waiting, done, "ended" if not part else "gave a reply that is no verdict")
        elif ended:
            process.text.clear()
            self._take(process, line, waiting, done)

    def _take(self, process: _Process, line: bytes, waiting: deque[int], done: dict[int, Verdict]) -> None:
        try:
            reply = json.loads(line)
            if process.ready:
                verdict = _verdict(reply["score"], str(reply["why"]))
            elif "error" not in reply:
                self.seconds = {name: float(reply[name]) for name in self.names}
        except (ValueError, KeyError, TypeError):
            return self._lost(process, waiting, done, "gave a reply that is no verdict")
        if process.ready and process.job is not None:
            done[process.job], process.job = verdict, None
        elif "error" in reply:
            raise VerifierError(str(reply["error"]))
        process.ready, self._failed_starts = True, 0

    def _lost(self, process: _Process, waiting: deque[int], done: dict[int, Verdict], how: str) -> None:
        """Kill the process, whose job cannot be scored, and start another in its place."""
        _kill(process)
        if process.job is not None:
            done[process.job] = Verdict(None, f"the verifier's process {how}")
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
        return _Process(popen, popen.stdin, popen.stdout, time.monotonic() + START_SECONDS)


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
