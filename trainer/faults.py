"""Faults that are not the program's own, which the user is told in a line; others need their traceback."""

from __future__ import annotations

from dryvine.trainer.data.atomic import CannotWrite
from dryvine.trainer.rl.verifiers.pool import VerifierError

FAULTS = (CannotWrite, VerifierError, MemoryError, RuntimeError)  # of these, those that `in_a_line` explains


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, a GPU's, or torch's on the CPU, which has no type of its own. The GPU's
    is told by its name, since plans are made where torch is not installed."""
    named = type(error).__name__ == "OutOfMemoryError"
    return named or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def in_a_line(error: BaseException) -> str | None:
    """What to tell the user of a fault; None for one that needs its traceback."""
    if isinstance(error, CannotWrite | VerifierError):
        return str(error)
    if out_of_memory(error):
        return f"out of memory: {str(error).splitlines()[0] if str(error) else 'of this machine'}; see `dryvine plan`"
    return None
