"""Whether processes that were killed have ended, which they do a moment later."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path


def alive(pid: str) -> bool:
    """Not ended. Who started it may not have asked how yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_ended(pids: Sequence[str], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < until, f"still there: {left}"
        time.sleep(0.05)
