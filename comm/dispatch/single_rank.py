"""A group of one rank, where nothing travels: rows are gathered once into the experts' order and summed from it.

On a GPU the host reads nothing: there are as many rows as pairs. So a choice that repeats within a token is not refused
there; it can only count an expert twice, and no gate makes one. With an alignment the number of rows depends on the
counts, which are read.

`flat` has the same bits but gathers twice: into a send buffer, and out of the receive buffer; and back in the same way.
With one rank the order in which pairs are sent is the order in which experts take them, so one index serves both ways.
`fake`, whose other ranks do not exist, places its rows likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.counts import DeviceCounts
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.dispatch.payload import Format, gather
from dryvine.comm.dispatch.routing import Arrival, RowOrder, Sum
from dryvine.comm.pending import Pending


@dataclass(frozen=True)
class Local:
    """Where rows go within a rank: the handle of `SingleRank`."""

    counts: Sequence[int]  # rows of each expert, with padding
    pair: Tensor  # [R] the pair t * K + k of each result row, -1 for padding
    token: Tensor  # [R] and its token
    place: Tensor  # [T, K] result row of each pair
    sum: Sum  # of result rows, by token, in the order of its choices

    @staticmethod
    def of(order: RowOrder, host: Tensor, alignment: int) -> Local:
        """`order` is for one rank, `host` its message on the host."""
        used = tuple(host[0, :-1].tolist())
        if all(n % alignment == 0 for n in used):
            return Local(used, order.pair, order.token, order.place, Sum.even(order.place))
        arrival = Arrival.of(order.message, host, alignment)
        pair, token = (torch.where(arrival.order < 0, -1, index[arrival.order]) for index in (order.pair, order.token))
        place = arrival.back[order.place]
        return Local(arrival.counts, pair, token, place, Sum.even(place))

    @staticmethod
    def unread(order: RowOrder) -> Local:
        """The same without an alignment, and with counts that stay on the device."""
        counts = DeviceCounts(order.message[0, :-1], len(order.pair))
        return Local(counts, order.pair, order.token, order.place, Sum.even(order.place))

    def dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None) -> tuple[Tensor, ...]:
        values = () if pairs is None else (gather(pairs.flatten(), self.pair),)
        return (*(gather(tensor, self.token) for tensor in rows), *values)

    def combine(self, rows: Tensor, pairs: Tensor | None) -> tuple[Tensor, ...]:
        return (self.sum(rows), *(() if pairs is None else (pairs[self.place],)))


class SingleRank:
    """`Dispatcher` of a single rank, which holds all experts. Its copies are counted like those that flat
    sends to itself."""

    def __init__(self, experts: int, alignment: int = 1, meter: Meter | None = None) -> None:
        self.experts, self.alignment, self.meter = experts, alignment, meter or Meter()

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[Local]:
        order = routing.by_expert(experts_TK, 1, self.experts)
        self._count(1, order.message)
        if order.message.is_cuda and self.alignment == 1:
            return Pending.done(Local.unread(order))
        return Pending(lambda: self._read(order))

    def _read(self, order: RowOrder) -> Local:
        (host,) = routing.read(order.message)  # the one read on the host
        routing.refuse(host[:, -1].nonzero().flatten().tolist())
        return Local.of(order, host, self.alignment)

    def dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: Local) -> Pending[tuple[Tensor, ...]]:
        self._count(handle.place.numel(), *rows, *(() if pairs is None else (pairs.flatten(),)))
        return Pending.done(handle.dispatch(rows, pairs))

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: Local) -> Pending[tuple[Tensor, ...]]:
        self._count(handle.place.numel(), rows, *(() if pairs is None else (pairs,)))
        return Pending.done(handle.combine(rows, pairs))

    def _count(self, rows: int, *payload: Tensor) -> None:
        self.meter.add(("self",), (rows,), Format.of(payload).bytes)
