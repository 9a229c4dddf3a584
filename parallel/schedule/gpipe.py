"""GPipe: all forwards, then all backwards (arXiv 1811.06965).

The same bubble as 1F1B, but every microbatch is held at once: here as the yardstick that the others are measured by.
"""

from __future__ import annotations

from dryvine.parallel.schedule.ir import Op, Schedule
from dryvine.parallel.schedule.rules import Generator, Sizes, one_chunk, straight


def _make(sizes: Sizes) -> Schedule:
    ranks = tuple(
        tuple((Op(kind, rank, m),) for kind in ("F", "B") for m in range(sizes.microbatches))
        for rank in range(sizes.pp)
    )
    return Schedule("gpipe", sizes.microbatches, straight(sizes.pp), ranks)


gpipe = Generator(_make, one_chunk, "chunks 1")
