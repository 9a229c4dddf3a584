"""Ranks of `dryvine train` that start in a fraction of a second: forked from a process that has torch, under the real
launcher. Everything but the start of the interpreter is as a user has it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import torch

from dryvine.launch.spawn import Launch, rank_environment
from dryvine.trainer import __main__ as trainer_main
from dryvine.trainer import adam
from dryvine.trainer.__main__ import main


def _rank(environment: dict[str, str], words: Sequence[str], log: str) -> None:
    os.environ.update(environment | {"GLOO_SOCKET_IFNAME": "lo"})
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    for module in (adam, trainer_main):
        module.load_cpu_adam = lambda: "not here: to load it takes longer than a test of restarts may"  # type: ignore[attr-defined]
    sys.exit(main(words))


class QuickRank:
    """What `spawn` needs of a process."""

    def __init__(self, rank: int, launch: Launch, port: int, log: str) -> None:
        environment = rank_environment(rank, launch.world, port)
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_rank, args=(environment, launch.words, log))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self) -> None:
        self.process.join()


class Attempts:
    """The attempts of a run whose ranks are started again and again; `start` stands in for `spawn._start`."""

    def __init__(self, log: str) -> None:
        self.log, self.ranks = log, list[QuickRank]()
        self._changed = threading.Condition()

    def start(self, rank: int, launch: Launch, port: int) -> QuickRank:
        one = QuickRank(rank, launch, port, self.log)
        with self._changed:
            self.ranks = [*(self.ranks if rank else []), one]
            self._changed.notify_all()
        return one

    def wait_for(self, world: int, after: list[QuickRank], seconds: float) -> list[QuickRank]:
        """The ranks of the first attempt that is not `after`; none if none has started in time."""
        with self._changed:
            new = self._changed.wait_for(lambda: len(self.ranks) == world and self.ranks[0] not in after, seconds)
            return list(self.ranks) if new else []


def kill(ranks: Sequence[QuickRank]) -> int:
    """SIGKILL those that live. Returns how many did."""
    living = [rank for rank in ranks if rank.poll() is None]
    for rank in living:
        with suppress(ProcessLookupError):
            rank.kill()
    return len(living)
