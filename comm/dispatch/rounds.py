"""A dispatch in rounds of fewer tokens, for routing so uneven that one dispatch would not fit in memory.

In the first thousands of steps a router may send everything to one rank: staging buffers would then hold many times
their usual rows. Beyond a factor of the mean load a dispatch goes in several rounds instead of running out of memory.
Dropping tokens, the usual way out, trains another model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Generic

import torch
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.api import Dispatcher, H
from dryvine.comm.dispatch.exchange import Exchange
from dryvine.comm.pending import Pending


@dataclass(frozen=True)
class RoundsHandle(Generic[H]):
    """One inner handle per round, and where the round's tokens and rows lie among those of all rounds."""

    counts: tuple[int, ...]
    handles: tuple[H, ...]
    places: tuple[Tensor, ...]  # per round, int64 [rows of the round]: the result row of each
    tokens: tuple[int, ...]  # per round: how many


class InRounds(Generic[H]):
    """`Dispatcher` that goes in rounds where the busiest rank would receive more than `factor` times the mean.

    It costs one all-to-all of W numbers per rank and one host read per routing more than its inner dispatcher, and rows
    of one expert lie by round, then source rank. What a dispatch returns is as large as the load is.
    """

    def __init__(self, inner: Dispatcher[H], exchange: Exchange, experts: int, factor: float) -> None:
        """`exchange` is over the whole group and counts into the meter of `inner`."""
        self.inner, self.exchange, self.share, self.factor = inner, exchange, experts // exchange.size, factor
        self.meter = inner.meter

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[RoundsHandle[H]]:
        ranks, ones = self.exchange.size, [1] * self.exchange.size
        to_W = routing.count(experts_TK // self.share, ranks)
        # Every rank tells every other all its loads, so that all work out the same number of rounds.
        coming = self.exchange.start(to_W.expand(ranks, ranks).contiguous(), ones, ones, what=f"load of {label}")
        return Pending(lambda: self._rounds(experts_TK, coming.wait().sum(0).tolist(), label), coming.ready)

    def _rounds(self, experts_TK: Tensor, loads: Sequence[int], label: str) -> RoundsHandle[H]:
        rounds = max(1, ceil(imbalance(loads) / self.factor))
        total = len(experts_TK)
        tokens = tuple(total * (r + 1) // rounds - total * r // rounds for r in range(rounds))
        handles = tuple(self.inner.plan_routing(part, label).wait() for part in experts_TK.split(tokens))
        counts_RX = [tuple(handle.counts) for handle in handles]
        sizes = [sum(counts) for counts in counts_RX]
        # Rows arrive by (round, expert) and are wanted by (expert, round).
        order = routing.transposed(routing.upload(counts_RX, experts_TK.device), sum(sizes))
        places = routing.invert(order).split(sizes)
        return RoundsHandle(tuple(map(sum, zip(*counts_RX, strict=True))), handles, places, tokens)

    def dispatch(
        self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: RoundsHandle[H]
    ) -> Pending[tuple[Tensor, ...]]:
        if len(handle.handles) == 1:
            return self.inner.dispatch(rows, pairs, handle.handles[0])
        return Pending(lambda: self._dispatch(rows, pairs, handle))

    def _dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: RoundsHandle[H]) -> tuple[Tensor, ...]:
        received = sum(handle.counts)
        out = [t.new_empty((received, *t.shape[1:])) for t in rows]
        if pairs is not None:
            out.append(pairs.new_empty(received))
        rows_by_round = zip(*(t.split(handle.tokens) for t in rows), strict=True)
        pairs_by_round = [None] * len(handle.tokens) if pairs is None else pairs.split(handle.tokens)
        for part, some, inner, place in zip(rows_by_round, pairs_by_round, handle.handles, handle.places, strict=True):
            for full, piece in zip(out, self.inner.dispatch(part, some, inner).wait(), strict=True):
                full.index_copy_(0, place, piece)
        return tuple(out)

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: RoundsHandle[H]) -> Pending[tuple[Tensor, ...]]:
        if len(handle.handles) == 1:
            return self.inner.combine(rows, pairs, handle.handles[0])
        return Pending(lambda: self._combine(rows, pairs, handle))

    def _combine(self, rows: Tensor, pairs: Tensor | None, handle: RoundsHandle[H]) -> tuple[Tensor, ...]:
        results = []
        for place, inner in zip(handle.places, handle.handles, strict=True):
            values = None if pairs is None else pairs[place]
            results.append(self.inner.combine(rows.index_select(0, place), values, inner).wait())
        return tuple(torch.cat(column) for column in zip(*results, strict=True))


def imbalance(rows: Sequence[int]) -> float:
    """The busiest over the mean: 1 is even, and so is no load at all."""
    return max(rows) * len(rows) / sum(rows) if sum(rows) else 1.0
