"""Start a run's ranks on this machine, see them to their end, and start them again if they fail.

`torchrun ... -m dryvine.trainer CONFIG` starts the same ranks. It is not used here because of how it ends: it kills
ranks 30 s after a signal, in the middle of a step or of a save, and says 0 or 1 whatever they said. Here a signal is
passed on and waited for as long as ranks wait for each other, and the exit code is what the ranks say
(`trainer.exit_codes`). The store through which ranks meet lives in this process, so it
outlasts any of them, and those that are left can still tell who is gone.
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

POLL = 0.1  # seconds between looks at the ranks
FAILED = 20.0  # seconds that ranks get to name a culprit when one has failed: a roll call takes under 10
REFUSED = 3.0  # and when one was refused, which the others will be too, or would wait for it
UNHURRIED = 30.0  # seconds beyond the deadline of a wait that a rank gets to end its step and save


@dataclass
class Launch:
    """What to run: `world` ranks with `words`, and how long a rank may wait for another (comm.deadline)."""

    world: int
    words: Sequence[str]
    deadline: float


@dataclass
class _Asked:
    """Signals that this process got, for its ranks."""

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
        """Ctrl-C twice: do not wait for a save."""
        return self.signals.count(signal.SIGINT) > 1


def spawn(launch: Launch, restarts: int = 0) -> int:
    """Run to the end, and start again at most `restarts` times what fails. Returns the exit code."""
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
    """One life of the ranks."""

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
            # Once: a rank that has saved and is leaving would die of a second.
            self.passed_on = True
            for process in self.ranks:
                process.terminate()
            self._within(self.launch.deadline + UNHURRIED)

    def _within(self, seconds: float) -> None:
        self.until = min(self.until, time.monotonic() + seconds)

    def _patience(self, code: int) -> float:
        """Seconds that the others get once a rank has ended with `code`."""
        if code in (ExitCode.FINISHED, ExitCode.STOPPED):
            return self.launch.deadline + UNHURRIED
        return REFUSED if code == ExitCode.REFUSED else FAILED

    def _code(self) -> int:
        """Of the whole run, and in a line why, where no rank has said it."""
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
    """What torchrun would set. `port` is that of the store."""
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
    """In a process group of its own: a terminal's signals come by way of this process alone."""
    environment = os.environ | rank_environment(rank, launch.world, port) | {PARENT: str(os.getpid())}
    words = (sys.executable, "-m", "dryvine.trainer", *launch.words)
    return subprocess.Popen(words, env=environment, process_group=0)
