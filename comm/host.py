"""Host memory that stays: large CPU tensors reuse what was freed instead of asking the kernel for pages each time.

glibc gives back every block above 32 MiB when it is freed, and the kernel zeroes its pages on the next use. On CPU ranks
that costs many times what the copy into them does: a gather of 58 MB took 46 ms so and 3 ms into memory that stayed.
A pool of our own would do it for wire buffers only; the allocator does it for every tensor of the process.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> bool:
    """Call once per process, before large tensors are made. False where the allocator is not glibc's; nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never_give_back = 2**31 - 1
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, never_give_back), (M_ARENA_MAX, 1))
    return all(mallopt(name, value) == 1 for name, value in settings)
