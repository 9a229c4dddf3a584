"""What a named schedule is: a generator, the sizes that it allows, and that rule in words.

The predicate is the rule; the nearest legal sizes are searched with it, so no message can disagree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from dryvine.parallel.schedule.ir import Schedule

# How far the nearest legal sizes are searched for: of one size alone, and of all together.
FAR, FAR_TOGETHER = 20_000, 100


class ScheduleError(ValueError):
    """A schedule that cannot be built or must not run. The message says what, where, and what would be right."""


class Sizes(NamedTuple):
    """`pp` pipeline ranks, `microbatches` in a step, `chunks`: stages per rank."""

    pp: int
    microbatches: int
    chunks: int


class Generator(NamedTuple):
    """A named schedule: how to make it, which sizes it allows, and the same rule in words."""

    make: Callable[[Sizes], Schedule]
    allows: Callable[[Sizes], bool]
    rule: str
    chunks: int = 1  # the least, and the default

    def explain(self, name: str, sizes: Sizes) -> str | None:
        """None if `sizes` are legal, else one line: the sizes, the rule, and the nearest legal sizes."""
        if min(sizes) >= 1 and self.allows(sizes):
            return None
        asked = f"pp={sizes.pp}, microbatches={sizes.microbatches}, chunks={sizes.chunks}"
        near = " or ".join(self._nearest(sizes))
        return f"{name} cannot run {asked}: it needs {self.rule}" + (f"; nearest legal: {near}" if near else "")

    def _nearest(self, sizes: Sizes) -> list[str]:
        """The closest legal value of each size with the others kept; if one change is not enough, of all together;
        empty if that is further than anybody means."""
        near = [f"{field}={value}" for field in Sizes._fields for value in self._legal_values(field, sizes)]
        if near:
            return near
        if max(map(abs, sizes)) > FAR_TOGETHER:
            return []
        reach = range(1, 2 * sum(abs(n) for n in sizes) + 9)
        legal = (Sizes(p, m, c) for p in reach for m in reach for c in range(1, 5))
        best = min(
            (s for s in legal if self.allows(s)), key=lambda s: sum(abs(a - b) for a, b in zip(s, sizes, strict=True))
        )
        return [", ".join(f"{field}={value}" for field, value in best._asdict().items())]

    def _legal_values(self, field: str, sizes: Sizes) -> Iterator[int]:
        """Of one size, the others kept: the nearest legal value below, and above."""
        asked = getattr(sizes, field)
        if min(sizes._replace(**{field: 1})) < 1:
            return
        for direction in (-1, 1):
            reach = range(1, min(4 * max(sizes), FAR) + 9)
            tries = (asked + direction * step for step in reach)
            legal = (n for n in tries if n >= 1 and self.allows(sizes._replace(**{field: n})))
            yield from islice(legal, 1)


def one_chunk(sizes: Sizes) -> bool:
    return sizes.chunks == 1


def straight(pp: int) -> tuple[tuple[int, ...], ...]:
    """One route, stage s on rank s."""
    return (tuple(range(pp)),)


def vee(pp: int) -> tuple[tuple[int, ...], ...]:
    """One route that turns back: stage s and stage 2 pp - 1 - s on rank s."""
    return ((*range(pp), *reversed(range(pp))),)


def opposite(pp: int) -> tuple[tuple[int, ...], ...]:
    """Two routes, one from rank 0 to the last and one back."""
    there = tuple(range(pp))
    return there, there[::-1]
