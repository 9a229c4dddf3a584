"""What the exit code of a training command says.

Only FINISHED ends a restart loop (`until dryvine train ...; do :; done`). A signal after which nothing was saved ends a
command with 128 + its number, as shells have it. Imports no torch.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Of `dryvine train` and of each rank; docs/checkpoints.md has them as a table."""

    FINISHED = 0
    FAULT = 1  # a rank died or failed, a disk is full, ...: the same command goes on from the newest checkpoint
    REFUSED = 2  # config, data or checkpoint; nothing was begun, and the same command is refused again
    DIVERGED = 3  # losses, gradients or weights are not finite; the same command would diverge again
    STOPPED = 75  # by a signal, after a save; the same command goes on from there (sysexits.h: try again later)
