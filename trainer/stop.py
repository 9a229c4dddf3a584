"""Signals that ask a run to stop: they set a flag, which is read between steps. SLURM's warning (SIGUSR1), a closed
terminal (SIGHUP) and Ctrl-C have the effect of SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class Stop:
    """Set by a signal."""

    asked: bool = False

    @contextmanager
    def on_signals(self) -> Iterator[Stop]:
        def ask(number: int, frame: object) -> None:
            self.asked = True

        before = {number: signal.signal(number, ask) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
