"""The plain dispatcher: one all_to_all_single, a row per token-expert pair. The oracle of every other.

It sends a token once per expert that it chose, so over InfiniBand up to K times what `hierarchical` sends; in exchange
it is one collective, one permutation and fifty lines to trust. On one node of few ranks it is also the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm import routing
from dryvine.comm.api import Pending
from dryvine.comm.exchange import Exchange, GroupExchange
from dryvine.comm.payload import Format
from dryvine.comm.pool import Pool
from dryvine.comm.routing import Sum


@dataclass(frozen=True)
class FlatHandle:
    """Send position i holds pair `pair[i]`; result row j came at position `came[j]`; row `back[i]` came at i."""

    counts: tuple[int, ...]  # rows given for each local expert, with padding
    used: tuple[int, ...]  # of which real
    label: str  # whose routing this is, for errors
    sends: tuple[int, ...]  # rows to each rank
    receives: tuple[int, ...]  # rows from each rank
    pair: Tensor  # [P]
    place: Tensor  # [T, K], send position of pair (t, k)
    came: Tensor  # [R]
    back: Tensor  # [rows that came]
    holes: Tensor  # positions of the padding

    @property
    def sum(self) -> Sum:
        """Of what came back, by token, in the order of its choices."""
        tokens, choices = self.place.shape
        return Sum(self.place.flatten(), torch.arange(tokens, device=self.place.device) * choices)

    @property
    def token(self) -> Tensor:
        return self.pair // self.place.shape[1]


class Flat:
    """`Dispatcher` over the ranks of `group` (None: this rank alone), who hold experts in equal, contiguous shares."""

    def __init__(
        self, group: dist.ProcessGroup | None, experts: int, alignment: int = 1, exchange: Exchange | None = None
    ) -> None:
        """`exchange`, if given, carries the rows in place of one over `group`."""
        self.exchange = exchange or GroupExchange(group)
        self.meter, self.pool = self.exchange.meter, Pool()
        self.experts, self.alignment = experts, alignment
        if experts % self.exchange.size:
            raise ValueError(f"experts = {experts} do not divide over {self.exchange.size} expert-parallel ranks")

    def layout(self, experts_TK: Tensor, label: str = "") -> Pending[FlatHandle]:
        pair_P = experts_TK.flatten().argsort(stable=True)
        counts_WX = routing.count(experts_TK, self.experts).view(self.exchange.size, -1)
        refused_W1 = routing.repeated(experts_TK).expand(self.exchange.size, 1)
        ours = torch.cat((counts_WX, refused_W1), dim=1)
        ones = [1] * self.exchange.size
        coming = self.exchange.start(ours, ones, ones, what=f"layout of {label}")
        place_TK = routing.invert(pair_P).view_as(experts_TK)
        return Pending(lambda: self._handle(pair_P, place_TK, ours, coming.wait(), label), coming.ready)

    def _handle(self, pair_P: Tensor, place_TK: Tensor, ours: Tensor, theirs: Tensor, label: str) -> FlatHandle:
        to, come = torch.stack((ours, theirs)).tolist()  # the one read on the host
        routing.refuse([rank for rank, row in enumerate(come) if row[-1]])
        receives = tuple(sum(row[:-1]) for row in come)
        used = tuple(sum(column) for column in zip(*(row[:-1] for row in come), strict=True))
        padding = routing.Padding.of(used, self.alignment, theirs.device)
        came_R = routing.transposed(theirs[:, :-1], sum(receives))
        return FlatHandle(
            counts=padding.counts,
            used=used,
            label=label,
            sends=tuple(sum(row[:-1]) for row in to),
            receives=receives,
            pair=pair_P,
            place=place_TK,
            came=padding.fill(came_R),
            back=padding.place[routing.invert(came_R)],
            holes=padding.holes,
        )

    def dispatch(
        self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: FlatHandle
    ) -> Pending[tuple[Tensor, ...]]:
        payload = rows if pairs is None else (*rows, pairs.flatten())
        indexes = [handle.token] * len(rows) + [handle.pair] * (pairs is not None)
        wire = Format.of(payload)
        finish = self._exchange(wire, payload, indexes, handle.sends, handle.receives, f"dispatch of {handle.label}")
        return Pending(lambda: finish(lambda came: tuple(wire.unpack(came, handle.came, handle.holes))))

    def _exchange(
        self,
        wire: Format,
        payload: Sequence[Tensor],
        indexes: Sequence[Tensor],
        sends: Sequence[int],
        receives: Sequence[int],
        what: str,
    ) -> Callable[[Callable[[Tensor], tuple[Tensor, ...]]], tuple[Tensor, ...]]:
        """Start; gives a function that waits, lets its argument read what came, and takes the buffers back."""
        device, alone = indexes[0].device, self.exchange.size == 1
        packed = wire.pack(payload, indexes, self.pool.take(sum(sends), wire.lanes, device))
        into = None if alone else self.pool.take(sum(receives), wire.lanes, device)
        coming = self.exchange.start(packed, sends, receives, into, what)

        def finish(read: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            came = coming.wait()
            result = read(came)
            self.pool.give(packed, *([] if alone else [came]))
            return result

        return finish

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: FlatHandle) -> Pending[tuple[Tensor, ...]]:
        payload = (rows,) if pairs is None else (rows, pairs)
        wire = Format.of(payload)
        indexes = [handle.back] * len(payload)
        finish = self._exchange(wire, payload, indexes, handle.receives, handle.sends, f"combine of {handle.label}")

        def read(came: Tensor) -> tuple[Tensor, ...]:
            back, *weights = wire.unpack(came)
            return (handle.sum(back), *(w[handle.place] for w in weights))

        return Pending(lambda: finish(read))
