"""Faults that are not the program's own, which the user is told in a line; others need their traceback."""

from __future__ import annotations

from dryvine.trainer.data.atomic import CannotWrite
from dryvine.trainer.rl.verifiers.pool import VerifierError

FAULTS = (CannotWrite, VerifierError, MemoryError, RuntimeError)  # of these, those that `in_a_line` explains


def in_a_line(error: BaseException) -> str | None:
    """What to tell the user of a fault; None for one that needs its traceback."""
    if isinstance(error, CannotWrite | VerifierError):
        return str(error)
    from dryvine.trainer.fits import out_of_memory  # loads torch

    if out_of_memory(error):
        return f"out of memory: {str(error).splitlines()[0] if str(error) else 'of this machine'}; see `dryvine plan`"
    return None
