"""The plain dispatcher: one all_to_all_single, a row per token-expert pair. The oracle of every other.

It sends a token once per expert that it chose, so over InfiniBand up to K times what `hierarchical` sends; in exchange
it is one collective, one permutation and fifty lines to trust. On one node of few ranks it is also the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm import routing
from dryvine.comm.api import Pending
from dryvine.comm.exchange import Exchange
from dryvine.comm.payload import Format


@dataclass(frozen=True)
class FlatHandle:
    """Send position i holds pair `pair[i]`; result row j came at position `came[j]`."""

    counts: tuple[int, ...]
    sends: tuple[int, ...]  # rows to each rank
    receives: tuple[int, ...]  # rows from each rank
    pair: Tensor  # [P]
    place: Tensor  # [T, K], send position of pair (t, k)
    came: Tensor  # [R]
    back: Tensor  # [R], the inverse of came

    @property
    def token(self) -> Tensor:
        return self.pair // max(1, self.place.shape[1])


class Flat:
    """`Dispatcher` over the ranks of `group` (None: this rank alone); each has an equal, contiguous share of experts."""

    def __init__(self, group: dist.ProcessGroup | None, experts: int) -> None:
        self.exchange = Exchange(group)
        self.experts = experts
        if experts % self.exchange.size:
            raise ValueError(f"experts = {experts} do not divide over {self.exchange.size} expert-parallel ranks")

    def layout(self, experts_TK: Tensor) -> Pending[FlatHandle]:
        pair_P = experts_TK.flatten().argsort(stable=True)
        counts_WX = routing.count(experts_TK, self.experts).view(self.exchange.size, -1)
        refused_W1 = routing.repeated(experts_TK).expand(self.exchange.size, 1)
        ours = torch.cat((counts_WX, refused_W1), dim=1)
        coming = self.exchange.start(ours, [1] * self.exchange.size, [1] * self.exchange.size)
        return Pending(lambda: self._handle(experts_TK, pair_P, ours, coming.wait()))

    def _handle(self, experts_TK: Tensor, pair_P: Tensor, ours: Tensor, theirs: Tensor) -> FlatHandle:
        to, come = torch.stack((ours, theirs)).tolist()  # the one read on the host
        refuse([rank for rank, row in enumerate(come) if row[-1]])
        receives = tuple(sum(row[:-1]) for row in come)
        came_R = routing.by_expert(theirs[:, :-1], sum(receives))
        return FlatHandle(
            counts=tuple(sum(column) for column in zip(*(row[:-1] for row in come), strict=True)),
            sends=tuple(sum(row[:-1]) for row in to),
            receives=receives,
            pair=pair_P,
            place=routing.invert(pair_P).view_as(experts_TK),
            came=came_R,
            back=routing.invert(came_R),
        )

    def dispatch(
        self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: FlatHandle
    ) -> Pending[tuple[Tensor, ...]]:
        payload = rows if pairs is None else (*rows, pairs.flatten())
        indexes = [handle.token] * len(rows) + [handle.pair] * (pairs is not None)
        wire = Format.of(payload)
        coming = self.exchange.start(wire.pack(payload, indexes), handle.sends, handle.receives)
        return Pending(lambda: wire.unpack(coming.wait(), handle.came))

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: FlatHandle) -> Pending[tuple[Tensor, ...]]:
        payload = (rows,) if pairs is None else (rows, pairs)
        wire = Format.of(payload)
        packed = wire.pack(payload, [handle.back] * len(payload))
        coming = self.exchange.start(packed, handle.receives, handle.sends)

        def finish() -> tuple[Tensor, ...]:
            back, *weights = wire.unpack(coming.wait())
            return (routing.summed(back, handle.place), *(w[handle.place] for w in weights))

        return Pending(finish)


def refuse(ranks: list[int]) -> None:
    """Raise on every rank if some rank's routing named an expert twice for one token."""
    if ranks:
        raise ValueError(
            f"routing of expert-parallel rank {ranks[0]}: a token chose the same expert twice; "
            "choices must differ within a token (use top-k without replacement)"
        )
