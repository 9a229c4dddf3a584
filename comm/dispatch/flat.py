"""The plain dispatcher: one all_to_all_single, a row per token-expert pair. The oracle of every other.

It sends a token once per expert that it chose, so over InfiniBand up to K times what `hierarchical` sends; in exchange
it is one collective, one permutation and fifty lines to trust. On one node of few ranks it is also the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.api import Dispatcher
from dryvine.comm.dispatch.buffers import StagingBuffers
from dryvine.comm.dispatch.exchange import Exchange
from dryvine.comm.dispatch.payload import Format
from dryvine.comm.dispatch.routing import Arrival, RowOrder, Sum
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.dispatch.single_rank import Local, SingleRank
from dryvine.comm.pending import Pending

Reader = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class FlatHandle:
    """Everything that both directions need, worked out once."""

    label: str  # whose routing this is, for errors
    sends: tuple[int, ...]  # rows to each rank
    receives: tuple[int, ...]  # rows from each rank
    order: RowOrder
    arrival: Arrival
    sum: Sum  # of the rows that come back, by token, in the order of its choices

    @property
    def counts(self) -> Sequence[int]:
        return self.arrival.counts


def build(setup: Setup) -> Dispatcher[FlatHandle] | Dispatcher[Local]:
    """A group of one rank exchanges nothing, so there it is `SingleRank`: the same bits for less."""
    if setup.group_topology.ranks == 1:
        return SingleRank(setup.experts, setup.alignment, setup.meter)
    return Flat(setup.exchange(), setup.experts, setup.alignment)


class Flat:
    """`Dispatcher` over the ranks of an exchange, which hold experts in equal, contiguous shares."""

    def __init__(self, exchange: Exchange, experts: int, alignment: int = 1) -> None:
        self.exchange, self.meter, self.buffers = exchange, exchange.meter, StagingBuffers()
        self.experts, self.alignment = experts, alignment
        if experts % exchange.size:
            raise ValueError(f"experts = {experts} do not divide over {exchange.size} expert-parallel ranks")

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[FlatHandle]:
        order, ones = routing.by_expert(experts_TK, self.exchange.size, self.experts), [1] * self.exchange.size
        coming = self.exchange.start(order.message, ones, ones, what=f"routing of {label}")
        summed = Sum.even(order.place)
        return Pending(lambda: self._handle(order, summed, coming.wait(), label), coming.ready)

    def _handle(self, order: RowOrder, summed: Sum, theirs: Tensor, label: str) -> FlatHandle:
        to, come = routing.read(order.message, theirs)  # the one read on the host
        routing.refuse(come[:, -1].nonzero().flatten().tolist())
        return FlatHandle(
            label=label,
            sends=tuple(to[:, :-1].sum(1).tolist()),
            receives=tuple(come[:, :-1].sum(1).tolist()),
            order=order,
            arrival=Arrival.of(theirs, come, self.alignment),
            sum=summed,
        )

    def dispatch(
        self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: FlatHandle
    ) -> Pending[tuple[Tensor, ...]]:
        payload = rows if pairs is None else (*rows, pairs.flatten())
        indexes = [handle.order.token] * len(rows) + [handle.order.pair] * (pairs is not None)
        wire = Format.of(payload)
        packed = self._packed(wire, payload, indexes)

        def read(arrived: Tensor) -> tuple[Tensor, ...]:
            return tuple(wire.unpack(arrived, handle.arrival.order))

        return self._exchange(packed, handle.sends, handle.receives, read, f"dispatch of {handle.label}")

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: FlatHandle) -> Pending[tuple[Tensor, ...]]:
        payload = (rows,) if pairs is None else (rows, pairs)
        wire = Format.of(payload)
        packed = self._packed(wire, payload, [handle.arrival.back] * len(payload))

        def read(arrived: Tensor) -> tuple[Tensor, ...]:
            back, *weights = wire.unpack(arrived)
            return (handle.sum(back), *(w[handle.order.place] for w in weights))

        return self._exchange(packed, handle.receives, handle.sends, read, f"combine of {handle.label}")

    def _packed(self, wire: Format, payload: Sequence[Tensor], indexes: Sequence[Tensor]) -> Tensor:
        space = self.buffers.take(len(indexes[0]), wire.words, indexes[0].device)
        return wire.pack(payload, indexes, space)

    def _exchange(
        self, packed: Tensor, sends: Sequence[int], receives: Sequence[int], read: Reader, what: str
    ) -> Pending[tuple[Tensor, ...]]:
        """Send wire rows; the result is what `read` makes of those that arrive, in tensors of its own."""
        alone = self.exchange.size == 1  # what arrives is then what was sent
        into = None if alone else self.buffers.take(sum(receives), packed.shape[1], packed.device)
        coming = self.exchange.start(packed, sends, receives, into, what)

        def finish() -> tuple[Tensor, ...]:
            arrived = coming.wait()
            result = read(arrived)
            self.buffers.give(packed, *([] if alone else [arrived]))
            return result

        return Pending(finish)
