"""1F1B: each rank forwards until its first microbatch is back, then alternates one forward and one backward.

Bubble (P-1)(F+B), at most P microbatches held (PipeDream-flush, arXiv 2006.09503; DeepSeek-V3, arXiv 2412.19437,
table 2). The plain one: whole backwards, one copy of the weights, no pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from dryvine.parallel.schedule.ir import Op, Schedule, Slot
from dryvine.parallel.schedule.rules import Generator, Sizes, one_chunk, straight


def alternate(forwards: Sequence[Op], backwards: Iterable[Sequence[Op]], ahead: int) -> tuple[Slot, ...]:
    """Slots of one op each: `ahead` forwards, then one more forward before each backward while there are any.

    An item of `backwards` is a B, or an I and the W to run after it. There are no more forwards than backwards.
    """
    ops, later = list(forwards[:ahead]), iter(forwards[ahead:])
    for backward in backwards:
        ops += [*islice(later, 1), *backward]
    return tuple((op,) for op in ops)


def _rank(rank: int, sizes: Sizes) -> tuple[Slot, ...]:
    forwards, backwards = ([Op(kind, rank, m) for m in range(sizes.microbatches)] for kind in ("F", "B"))
    return alternate(forwards, [(op,) for op in backwards], ahead=sizes.pp - 1 - rank)


def _make(sizes: Sizes) -> Schedule:
    ranks = tuple(_rank(rank, sizes) for rank in range(sizes.pp))
    return Schedule("one_f_one_b", sizes.microbatches, straight(sizes.pp), ranks)


one_f_one_b = Generator(_make, one_chunk, "chunks 1")
