"""Host memory that stays: the environment in which CPU ranks start, so that large tensors reuse what was freed.

glibc returns every block above 32 MiB to the kernel when it is freed, and the kernel zeroes its pages on the next use.
On CPU ranks that costs many times what the copy does: a gather of 58 MB took 46 ms that way and 3 ms into memory that
had stayed. Buffers of our own would help wire rows only; the allocator helps every tensor. It must be set before a
process starts: threads that exist already have arenas of their own, which ask for pages again each time.
"""

from __future__ import annotations

from collections.abc import Mapping

MALLOC: Mapping[str, str] = {
    # Large blocks come from the heap, not from the kernel, and go back to it.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    # One heap for all threads.
    "MALLOC_ARENA_MAX": "1",
}
