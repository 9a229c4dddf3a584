"""Whether programs can be contained on this machine, and which of them run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dryvine.trainer.rl.verifiers import sandbox
from dryvine.trainer.rl.verifiers.sandbox import SandboxError


def _obstacle() -> str:
    """Why programs cannot be contained here, or ""."""
    try:
        sandbox.check()
    except SandboxError as error:
        return str(error)
    return ""


_OBSTACLE = _obstacle()
needs_sandbox = pytest.mark.skipif(bool(_OBSTACLE), reason=_OBSTACLE)


def sandboxed() -> list[int]:
    """Processes of untrusted programs."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"/program.py" in words:
            found.append(pid)
    return found


def wait_until_none(pids: set[int]) -> None:
    until = time.monotonic() + 20
    while pids & set(sandboxed()):
        assert time.monotonic() < until, f"still there: {pids & set(sandboxed())}"
        time.sleep(0.05)
