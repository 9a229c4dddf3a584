"""ZB1P (ZB-H1, arXiv 2401.10241): 1F1B with backwards split, so that weight gradients fill what the drain leaves idle.

Rank p defers its W by p microbatches: the activations that 1F1B would not have held there are what it pays with, and no
rank holds more than P. Bubble (P-1)(F+B-2W).
"""

from __future__ import annotations

from dryvine.parallel.schedule.ir import Op, Schedule, Slot
from dryvine.parallel.schedule.one_f_one_b import alternate
from dryvine.parallel.schedule.rules import Generator, Sizes, one_chunk, straight


def _rank(rank: int, sizes: Sizes) -> tuple[Slot, ...]:
    forwards, inputs, weights = ([Op(kind, rank, m) for m in range(sizes.microbatches)] for kind in ("F", "I", "W"))
    # The W of microbatch m comes after the I of microbatch m + rank; the last `rank` of them come after all I.
    backwards = [(op, *weights[m - rank : m - rank + 1]) if m >= rank else (op,) for m, op in enumerate(inputs)]
    return alternate(forwards, [*backwards, weights[max(0, sizes.microbatches - rank) :]], ahead=sizes.pp - 1 - rank)


def _make(sizes: Sizes) -> Schedule:
    ranks = tuple(_rank(rank, sizes) for rank in range(sizes.pp))
    return Schedule("zb1p", sizes.microbatches, straight(sizes.pp), ranks)


zb1p = Generator(_make, one_chunk, "chunks 1")
