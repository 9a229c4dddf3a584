"""1F1B: each rank forwards until its first microbatch is back, then alternates one backward and one forward.

Bubble (P-1)(F+B), at most P microbatches held (PipeDream-flush, arXiv 2006.09503; DeepSeek-V3, arXiv 2412.19437,
table 2). The plain one: whole backwards, one copy of the weights, no pairs.
"""

from __future__ import annotations

from dryvine.parallel.schedule.ir import Op, Schedule, Slot
from dryvine.parallel.schedule.rules import Generator, Sizes, one_chunk, straight


def _rank(rank: int, pp: int, microbatches: int) -> tuple[Slot, ...]:
    ahead = min(pp - 1 - rank, microbatches)
    slots: list[Slot] = [(Op("F", rank, m),) for m in range(ahead)]
    for m in range(microbatches):
        if m + ahead < microbatches:
            slots.append((Op("F", rank, m + ahead),))
        slots.append((Op("B", rank, m),))
    return tuple(slots)


def _make(sizes: Sizes) -> Schedule:
    ranks = tuple(_rank(rank, sizes.pp, sizes.microbatches) for rank in range(sizes.pp))
    return Schedule("one_f_one_b", sizes.microbatches, straight(sizes.pp), ranks)


one_f_one_b = Generator(_make, one_chunk, "chunks 1")
