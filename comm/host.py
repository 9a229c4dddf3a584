"""What a process sets on its host: memory that stays, and an end with the process that started it.

Memory: the environment in which CPU ranks start, so that large tensors reuse what was freed.

glibc returns every block above 32 MiB to the kernel when it is freed, and the kernel zeroes its pages on the next use.
On CPU ranks that costs many times what the copy does: a gather of 58 MB took 46 ms that way and 3 ms into memory that
had stayed. Buffers of our own would help wire rows only; the allocator helps every tensor. It must be set before a
process starts: threads that exist already have arenas of their own, which ask for pages again each time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

MALLOC: Mapping[str, str] = {
    # Large blocks come from the heap, not from the kernel, and go back to it.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    # One heap for all threads.
    "MALLOC_ARENA_MAX": "1",
}

PARENT = "DRYVINE_PARENT"  # the environment variable with the process id of the launcher
_PR_SET_PDEATHSIG = 1


def stop_with(parent: int) -> None:
    """Send this process SIGTERM when `parent`, the process that started it, dies, so that ranks do not outlive a
    launcher that was killed. Does nothing outside Linux."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before
        os.kill(os.getpid(), signal.SIGTERM)


def available_memory() -> int:
    """Bytes that new processes can take without another being ended: Linux's own estimate, elsewhere all of it."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024
