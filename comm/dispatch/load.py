"""How evenly tokens fall on experts, what that moves, and what to do when they fall very unevenly.

`Metered` counts what passes through a dispatcher; a step's report is made from every rank's counts, where the trainer
logs. `InRounds` is for the first thousands of steps, when a router may send everything to one rank: staging buffers
would then hold many times their usual rows. Beyond a factor of the mean load a dispatch goes in several rounds of
fewer tokens instead of running out of memory. Dropping tokens, the usual way out, trains another model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.api import Dispatcher
from dryvine.comm.dispatch.exchange import Exchange, Meter
from dryvine.comm.pending import Pending


@dataclass(frozen=True)
class Share:
    """One rank's part of a step: rows of each local expert, by layer or label, and bytes sent by link class."""

    rows: dict[str, tuple[int, ...]]
    bytes: dict[str, int]


@dataclass(frozen=True)
class Load:
    """A step over one expert-parallel group, all layers together. Imbalance is the busiest over the mean: 1 is even."""

    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    bytes: dict[str, int]

    @staticmethod
    def of(shares: Sequence[Share]) -> Load:
        """`shares` by group rank."""
        per_rank = [tuple(map(sum, zip(*share.rows.values(), strict=True))) for share in shares]
        moved: Counter[str] = Counter()
        for share in shares:
            moved.update(share.bytes)
        return Load(tuple(x for rows in per_rank for x in rows), tuple(map(sum, per_rank)), dict(moved))

    @property
    def expert_imbalance(self) -> float:
        return imbalance(self.experts)

    @property
    def rank_imbalance(self) -> float:
        return imbalance(self.ranks)


def imbalance(rows: Sequence[int]) -> float:
    return max(rows) * len(rows) / sum(rows) if sum(rows) else 1.0


class Metered:
    """A dispatcher that remembers what went through it until `take`. Labels end in what varies within a step, after a
    comma ("layers.3, microbatch 7"); the part before it is the layer."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.meter: Meter = inner.meter
        self._rows: dict[str, list[int]] = {}

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[Any]:
        coming = self.inner.plan_routing(experts_TK, label)

        def finish() -> Any:
            handle = coming.wait()
            rows = self._rows.setdefault(label.partition(",")[0], [0] * len(handle.used))
            rows[:] = map(sum, zip(rows, handle.used, strict=True))
            return handle

        return Pending(finish, coming.ready)

    def dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: Any) -> Pending[tuple[Tensor, ...]]:
        result: Pending[tuple[Tensor, ...]] = self.inner.dispatch(rows, pairs, handle)
        return result

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: Any) -> Pending[tuple[Tensor, ...]]:
        result: Pending[tuple[Tensor, ...]] = self.inner.combine(rows, pairs, handle)
        return result

    def take(self) -> Share:
        """This rank's share since the last call."""
        rows, self._rows = self._rows, {}
        return Share({layer: tuple(counts) for layer, counts in rows.items()}, self.meter.take())


@dataclass(frozen=True)
class Rounds:
    """The handle of a guarded dispatch: one inner handle per round of tokens, and where its rows lie in the result."""

    counts: tuple[int, ...]
    used: tuple[int, ...]
    handles: tuple[Any, ...]
    places: tuple[Tensor, ...]
    bounds: tuple[int, ...]  # tokens of each round


class InRounds:
    """A dispatcher that goes in rounds when the busiest rank would get more than `factor` times the mean.

    It costs one all-to-all of W numbers per rank and one host read per layout more than its inner dispatcher, and rows
    of one expert come by round, then source rank. What a dispatch gives in the end is as large as the load is.
    """

    def __init__(self, inner: Dispatcher, exchange: Exchange, experts: int, factor: float) -> None:
        self.inner, self.exchange, self.share, self.factor = inner, exchange, experts // exchange.size, factor
        self.meter = exchange.meter

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[Rounds]:
        ranks, ones = self.exchange.size, [1] * self.exchange.size
        to_W = routing.count(experts_TK // self.share, ranks)
        coming = self.exchange.start(to_W.expand(ranks, ranks).contiguous(), ones, ones, what=f"load of {label}")
        return Pending(lambda: self._rounds(experts_TK, coming.wait().sum(0).tolist(), label), coming.ready)

    def _rounds(self, experts_TK: Tensor, loads: list[int], label: str) -> Rounds:
        rounds = max(1, -int(-imbalance(loads) // self.factor))
        tokens = len(experts_TK)
        bounds = tuple(tokens * (r + 1) // rounds - tokens * r // rounds for r in range(rounds))
        handles = tuple(self.inner.plan_routing(part, label).wait() for part in experts_TK.split(bounds))
        counts_RX = routing.upload([handle.counts for handle in handles], experts_TK.device)
        total = int(sum(sum(handle.counts) for handle in handles))
        from_rounds = routing.invert(routing.transposed(counts_RX, total))
        return Rounds(
            counts=tuple(map(sum, zip(*(handle.counts for handle in handles), strict=True))),
            used=tuple(map(sum, zip(*(handle.used for handle in handles), strict=True))),
            handles=handles,
            places=from_rounds.split([sum(handle.counts) for handle in handles]),
            bounds=bounds,
        )

    def dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: Rounds) -> Pending[tuple[Tensor, ...]]:
        if len(handle.handles) == 1:
            return self.inner.dispatch(rows, pairs, handle.handles[0])
        return Pending(lambda: self._dispatch(rows, pairs, handle))

    def _dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: Rounds) -> tuple[Tensor, ...]:
        given = rows if pairs is None else (*rows, pairs)
        out = [t.new_empty((sum(handle.counts), *t.shape[1:])) for t in rows]
        if pairs is not None:
            out.append(pairs.new_empty(sum(handle.counts)))
        parts = zip(*(t.split(handle.bounds) for t in given), strict=True)
        for part, place, inner in zip(parts, handle.places, handle.handles, strict=True):
            some, values = (part, None) if pairs is None else (part[:-1], part[-1])
            for whole, piece in zip(out, self.inner.dispatch(some, values, inner).wait(), strict=True):
                whole.index_copy_(0, place, piece)
        return tuple(out)

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: Rounds) -> Pending[tuple[Tensor, ...]]:
        if len(handle.handles) == 1:
            return self.inner.combine(rows, pairs, handle.handles[0])
        return Pending(lambda: self._combine(rows, pairs, handle))

    def _combine(self, rows: Tensor, pairs: Tensor | None, handle: Rounds) -> tuple[Tensor, ...]:
        done = []
        for place, inner in zip(handle.places, handle.handles, strict=True):
            values = None if pairs is None else pairs[place]
            done.append(self.inner.combine(rows.index_select(0, place), values, inner).wait())
        return tuple(torch.cat(column) for column in zip(*done, strict=True))
