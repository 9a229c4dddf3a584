"""Interleaved 1F1B: each rank holds `chunks` stages, stage s on rank s mod P (arXiv 2104.04473, section 2.2).

Microbatches go round in groups of about P, a group through all chunks before the next. The bubble of 1F1B divided by
`chunks`, for as many times more messages and for more activations.
"""

from __future__ import annotations

from dryvine.parallel.schedule.ir import Kind, Op, Schedule, Slot
from dryvine.parallel.schedule.one_f_one_b import alternate
from dryvine.parallel.schedule.rules import Generator, Sizes


def _group(sizes: Sizes) -> int:
    return sizes.microbatches // max(1, sizes.microbatches // sizes.pp)


def _ops(kind: Kind, rank: int, sizes: Sizes) -> list[Op]:
    """All of a rank's forwards or backwards, in order: backwards visit the chunks from last to first."""
    group = _group(sizes)
    chunks = range(sizes.chunks) if kind == "F" else range(sizes.chunks)[::-1]
    return [
        Op(kind, chunk * sizes.pp + rank, m)
        for start in range(0, sizes.microbatches, group)
        for chunk in chunks
        for m in range(start, start + group)
    ]


def _rank(rank: int, sizes: Sizes) -> tuple[Slot, ...]:
    forwards, backwards = _ops("F", rank, sizes), _ops("B", rank, sizes)
    ahead = (sizes.chunks - 1) * _group(sizes) + 2 * (sizes.pp - 1 - rank)
    return alternate(forwards, [(op,) for op in backwards], ahead)


def _make(sizes: Sizes) -> Schedule:
    routes = (tuple(s % sizes.pp for s in range(sizes.pp * sizes.chunks)),)
    return Schedule("interleaved", sizes.microbatches, routes, tuple(_rank(rank, sizes) for rank in range(sizes.pp)))


def _allows(sizes: Sizes) -> bool:
    return sizes.chunks >= 2 and sizes.microbatches % max(1, sizes.microbatches // sizes.pp) == 0


interleaved = Generator(
    _make,
    _allows,
    "chunks at least 2 and microbatches a multiple of microbatches // pp (so of pp, or below 2 pp)",
    chunks=2,
)
