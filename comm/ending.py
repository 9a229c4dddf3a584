"""The end of a process that has failed, or that waits for others in vain.

An interpreter that shuts down runs destructors, and those of a GPU's communicators wait for peers that are gone. So
whoever fails says why, runs the hooks and leaves by `os._exit`. Where something holds the interpreter meanwhile, a
timer in C, which needs none, ends the process a little later.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable

HOOKS = 2.0  # seconds that the hooks get


class Ending:
    """Of this process; one, since the timer is the process's."""

    def __init__(self) -> None:
        self._hooks: list[Callable[[], None]] = []

    def before(self, hook: Callable[[], None]) -> None:
        """Call `hook` right before the process ends: to end what a stream of a GPU waits for, without which the driver
        keeps the process (47 s were measured on an H100)."""
        self._hooks.append(hook)

    def within(self, seconds: float) -> None:
        """From now on the process has so many seconds, unless this is called again. Then every thread's traceback is
        printed and the exit code is 1. Hooks do not run: they need the interpreter."""
        faulthandler.dump_traceback_later(seconds, exit=True)

    def postpone(self) -> None:
        """Take back `within`."""
        faulthandler.cancel_dump_traceback_later()

    def show(self) -> None:
        """Print what every thread is doing."""
        faulthandler.dump_traceback()

    def now(self, code: int) -> None:
        """End the process: no destructors, no `finally`."""
        self.within(HOOKS)
        for hook in self._hooks:
            hook()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
