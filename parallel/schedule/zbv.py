"""ZB-V: split backwards on a pipe that is folded into a V (arXiv 2405.15362, section 3.2).

Each rank holds stages p and 2P-1-p. The steps are the paper's figure read as counts. At F = I = W only the first and
last ops of the pipe are a bubble, at the memory of 1F1B (2P chunks, each half as large).
"""

from __future__ import annotations

from collections import Counter
from typing import cast

from dryvine.parallel.schedule.ir import Kind, Op, Schedule, Slot
from dryvine.parallel.schedule.rules import Generator, Sizes, vee


def _letters(rank: int, pp: int, microbatches: int) -> str:
    """The rank's ops in order: F I W of its first stage, f i w of its second, each in microbatch order."""
    ahead = 2 * pp - rank - 1  # first-stage forwards in the warm-up; P second-stage forwards pass in it
    warm = "F" * (ahead - rank) + "fF" * rank + "fiw" * (pp - rank)
    steady = "FIWfiw" * (microbatches - ahead) + "IWfiw" * (ahead - pp)
    drain = "Ii" * rank + "IW" * (pp - rank)
    return warm + steady + drain + "w" * rank + "W" * rank


def _rank(rank: int, sizes: Sizes) -> tuple[Slot, ...]:
    """The letters as ops. A V shorter than its warm-up is a longer one without the microbatches that do not exist."""
    stages = (rank, 2 * sizes.pp - 1 - rank)
    count: Counter[str] = Counter()
    slots: list[Slot] = []
    for letter in _letters(rank, sizes.pp, max(sizes.microbatches, 2 * sizes.pp - 1)):
        slots.append((Op(cast(Kind, letter.upper()), stages[letter.islower()], count[letter]),))
        count[letter] += 1
    return tuple(slot for slot in slots if slot[0].microbatch < sizes.microbatches)


def _make(sizes: Sizes) -> Schedule:
    return Schedule("zbv", sizes.microbatches, vee(sizes.pp), tuple(_rank(rank, sizes) for rank in range(sizes.pp)))


def _allows(sizes: Sizes) -> bool:
    return sizes.chunks == 2


zbv = Generator(_make, _allows, "chunks 2", chunks=2)
