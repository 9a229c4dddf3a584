"""ZB1P (ZB-H1, arXiv 2401.10241): 1F1B with backwards split, so that weight gradients fill what the drain leaves idle.

Rank p defers its W by p microbatches: the activations that 1F1B would not have held there are what it pays with, and no
rank holds more than P. Bubble (P-1)(F+B-2W).
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
        slots.append((Op("I", rank, m),))
        if m >= rank:
            slots.append((Op("W", rank, m - rank),))
    slots += [(Op("W", rank, m),) for m in range(max(0, microbatches - rank), microbatches)]
    return tuple(slots)


def _make(sizes: Sizes) -> Schedule:
    ranks = tuple(_rank(rank, sizes.pp, sizes.microbatches) for rank in range(sizes.pp))
    return Schedule("zb1p", sizes.microbatches, straight(sizes.pp), ranks)


zb1p = Generator(_make, one_chunk, "chunks 1")
