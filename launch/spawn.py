"""Starts a run's ranks on this machine, waits for them, and restarts them if they fail.

`torchrun ... -m dryvine.trainer CONFIG` starts the same ranks. It is not used here because of how it ends them: it
kills ranks 30 s after a signal, in the middle of a step or a save, and exits with 0 or 1 whatever they exited with.
Here a signal is passed on, ranks get as long as they may wait for each other, and the exit code is theirs
(`trainer.exit_codes`). The store through which ranks meet lives in this process, so it outlasts any rank, and the
remaining ones can still tell which is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dryvine.comm.host import MALLOC, PARENT
from dryvine.trainer.exit_codes import ExitCode
from dryvine.trainer.say import say
from dryvine.trainer.stop import SIGNALS

POLL = 0.1  # seconds between polls of the ranks
FAILED = 20.0  # seconds that ranks get to name the culprit after one has failed: a roll call takes under 10
REFUSED = 3.0  # and after one was refused: the others will be too, or would wait for it
UNHURRIED = 30.0  # seconds beyond the deadline of a wait that a rank gets to end its step and save


@dataclass
class Launch:
    """What to start: `world` ranks with the arguments `words`; how long a rank may wait for another (comm.deadline)."""

    world: int
    words: Sequence[str]
    deadline: float


@dataclass
class _Asked:
    """Signals that this process received, for its ranks."""

    signals: list[int] = field(default_factory=list)

    @contextmanager
    def noted(self) -> Iterator[_Asked]:
        before = {number: signal.signal(number, lambda n, frame: self.signals.append(n)) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def impatient(self) -> bool:
        """Whether Ctrl-C was pressed twice: do not wait for a save."""
        return self.signals.count(signal.SIGINT) > 1


def spawn(launch: Launch, restarts: int = 0) -> int:
    """Run to the end; restart up to `restarts` times after a failure. Returns the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.world)))
    if not torch.cuda.is_available():
        os.environ.update(MALLOC)
    with _Asked().noted() as asked:
        for restart in range(restarts + 1):
            code = _Attempt(launch, asked).run()
            if code != ExitCode.FAULT or restart == restarts:
                break
            say(f"restart {restart + 1} of {restarts}, from the newest checkpoint")
    return code


class _Attempt:
    """One start of all ranks."""

    def __init__(self, launch: Launch, asked: _Asked) -> None:
        self.launch, self.asked = launch, asked
        self.ended: dict[int, int] = {}  # rank -> exit code, in the order in which they ended
        self.until = float("inf")  # when what is left is killed
        self.passed_on = False  # a signal, to the ranks

    def run(self) -> int:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks = [_start(rank, self.launch, store.port) for rank in range(self.launch.world)]
        try:
            while len(self.ended) < len(self.ranks) and time.monotonic() < self.until:
                self._look()
                time.sleep(POLL)
        finally:
            for process in self.ranks:
                process.kill()
                process.wait()
        return self._code()

    def _look(self) -> None:
        for rank, process in enumerate(self.ranks):
            code = process.poll()
            if code is not None and rank not in self.ended:
                self.ended[rank] = code
                self._within(self._patience(code))
        if self.asked.impatient:
            self._within(0.0)
        elif self.asked.signals and not self.passed_on:
            # Sent once: a second signal would kill a rank that has saved and is exiting.
            self.passed_on = True
            for process in self.ranks:
                process.terminate()
            self._within(self.launch.deadline + UNHURRIED)

    def _within(self, seconds: float) -> None:
        self.until = min(self.until, time.monotonic() + seconds)

    def _patience(self, code: int) -> float:
        """Seconds that the other ranks get after one has ended with `code`."""
        if code in (ExitCode.FINISHED, ExitCode.STOPPED):
            return self.launch.deadline + UNHURRIED
        return REFUSED if code == ExitCode.REFUSED else FAILED

    def _code(self) -> int:
        """The exit code of the whole run; prints why if no rank has."""
        good = (ExitCode.FINISHED, ExitCode.STOPPED)
        culprit = next((rank for rank, code in self.ended.items() if code not in good), None)
        if culprit is None and len(self.ended) == len(self.ranks):
            return max(self.ended.values())
        if self.asked.signals:
            number = self.asked.signals[0]
            say(f"stopped by {signal.Signals(number).name} before all ranks had saved")
            return 128 + number
        if culprit is None:
            late = min(set(range(len(self.ranks))) - set(self.ended))
            say(f"rank {late} did not end with the others, and was killed")
            return ExitCode.FAULT
        if (code := self.ended[culprit]) in (ExitCode.REFUSED, ExitCode.DIVERGED):
            return code
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed first, with exit code {code}"
        say(f"rank {culprit} {how}; what it said is above")
        return ExitCode.FAULT


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set. `port` is the store's."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # ranks connect to the store here, rank 0 makes none
    }


def _start(rank: int, launch: Launch, port: int) -> subprocess.Popen[bytes]:
    """Start a rank in a process group of its own, so that it gets a terminal's signals from this process only."""
    environment = os.environ | rank_environment(rank, launch.world, port) | {PARENT: str(os.getpid())}
    words = (sys.executable, "-m", "dryvine.trainer", *launch.words)
    return subprocess.Popen(words, env=environment, process_group=0)
