"""Host memory that stays: the environment in which CPU ranks start, so that large tensors reuse what was freed.

glibc gives back every block above 32 MiB when it is freed, and the kernel zeroes its pages on the next use. On CPU
ranks that costs many times what the copy does: a gather of 58 MB took 46 ms so and 3 ms into memory that stayed. A pool
of our own would do it for wire buffers only; the allocator does it for every tensor. It must be set before a process
starts: threads that exist already have arenas of their own, which ask for pages again each time.
"""

from __future__ import annotations

from collections.abc import Mapping

MALLOC: Mapping[str, str] = {
    "MALLOC_MMAP_MAX_": "0",  # large blocks come from the heap, not from the kernel
    "MALLOC_TRIM_THRESHOLD_": str(2**62),  # and go back to it
    "MALLOC_ARENA_MAX": "1",  # one heap for all threads
}
