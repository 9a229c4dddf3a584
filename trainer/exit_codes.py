"""Exit codes of training commands.

Only FINISHED ends a restart loop (`until dryvine train ...; do :; done`). A command that is ended by a signal without
having saved exits with 128 + the signal's number, as is usual in shells. Imports no torch.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `dryvine train` and of each rank; docs/checkpoints.md has them as a table."""

    FINISHED = 0
    FAULT = 1  # a rank died or failed, a disk is full, ...: the same command resumes from the newest checkpoint
    REFUSED = 2  # config, data or checkpoint; no training took place, and the same command is refused again
    DIVERGED = 3  # losses, gradients or weights are not finite; the same command would diverge again
    STOPPED = 75  # by a signal, after a save; the same command resumes from there (sysexits.h: EX_TEMPFAIL)
