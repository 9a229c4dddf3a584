"""Two hops: a token crosses to each node once, to the rank on its own rail, which passes it on to those that need it.

InfiniBand is 3 to 20 times slower than NVLink, and with top-8 routing several of a token's experts often share a node.
So (DeepSeek-V3, arXiv 2412.19437, section 3.2.2) hop 1 sends a row once per node, hop 2 once per rank of that node,
and copies for several experts of one rank are made after arrival. `flat` sends a row once per expert. Combine mirrors
it: rows are summed per rank, then per node in FP32, before they cross. It is plain torch.distributed: DeepEP does the
same in kernels, at the price of a native build and fixed node shapes.

Tokens go in `chunks`, so that hop 2 of one chunk runs while hop 1 of the next is on the wire; rows for this node
have no hop 1 and use the time before the first chunk lands. Sums are in FP32 but travel in the rows' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dryvine.comm.dispatch.api import Dispatcher
from dryvine.comm.dispatch.buffers import StagingBuffers
from dryvine.comm.dispatch.hop_groups import HopGroups, make_hop_groups
from dryvine.comm.dispatch.payload import Format
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.dispatch.two_hop_plan import Counted, Leg, Planner, TwoHopHandle
from dryvine.comm.dispatch.worker import Worker
from dryvine.comm.pending import Pending


def build(setup: Setup) -> Dispatcher[TwoHopHandle]:
    return two_hops(setup)


def two_hops(setup: Setup, by_copy: bool = False) -> Dispatcher[TwoHopHandle]:
    """`by_copy` as in `make_hop_groups`."""
    if setup.mesh is None:
        raise ValueError("comm.dispatcher = hierarchical: one process has no other to send to; use flat")
    groups = make_hop_groups(setup.mesh, setup, by_copy)
    return Hierarchical(groups, setup.experts, setup.mesh.device, setup.chunks, setup.alignment)


class Hierarchical:
    """`Dispatcher` over the ranks of an expert-parallel group.

    Waiting for a routing starts collectives too, so ranks must also wait for routings in the same order.
    """

    def __init__(
        self,
        groups: HopGroups,
        experts: int,
        device: torch.device | None = None,
        chunks: int = 4,
        alignment: int = 1,
    ) -> None:
        self.all, self.intra, self.inter, self.meter = groups.all, groups.node, groups.rail, groups.all.meter
        place = device or torch.device("cpu")
        self.planner = Planner(groups, experts, chunks, alignment, place)
        self.worker, self.buffers = Worker(place), StagingBuffers()

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[TwoHopHandle]:
        counted = self.worker.run(lambda: self._count(experts_TK, label))

        def plan() -> TwoHopHandle:
            ours, coming = counted.wait()
            return self.planner.plan(experts_TK, ours, coming.wait(), label)

        return Pending(lambda: self.worker.run(plan).wait(), lambda: counted.ready() and counted.wait()[1].ready())

    def dispatch(
        self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: TwoHopHandle
    ) -> Pending[tuple[Tensor, ...]]:
        return self.worker.run(lambda: self._dispatch(rows, pairs, handle))

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: TwoHopHandle) -> Pending[tuple[Tensor, ...]]:
        return self.worker.run(lambda: self._combine(rows, pairs, handle))

    def _count(self, experts_TK: Tensor, label: str) -> tuple[Counted, Pending[Tensor]]:
        counted = self.planner.count(experts_TK)
        ones = [1] * self.all.size
        return counted, self.all.start(counted.message, ones, ones, what=f"routing counts of {label}")

    def _dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: TwoHopHandle) -> tuple[Tensor, ...]:
        payload = rows if pairs is None else (*rows, pairs)
        wire = Format.of(payload)
        hop1, hop2 = f"dispatch hop 1 of {handle.label}", f"dispatch hop 2 of {handle.label}"
        with self.buffers.scratch(wire.words, rows[0].device) as take:

            def packed(leg: Leg) -> Tensor:
                return wire.pack(payload, [leg.index] * len(payload), take(leg.sent))

            # What crosses nodes takes longest, so it leaves first.
            crossing = [leg.there(self.inter, packed(leg), take(leg.received), hop1) for leg in handle.hop1]
            arrived = take(sum(leg.received for leg in handle.hop2))
            (own, space), *others = handle.stages(arrived)
            arriving = [own.there(self.intra, packed(own), space, hop2)]
            for coming, (leg, space) in zip(crossing, others, strict=True):
                onward = torch.index_select(coming.wait(), 0, leg.index, out=take(leg.sent))
                arriving.append(leg.there(self.intra, onward, space, hop2))
            for stage in arriving:
                stage.wait()
            return handle.copies.unpack(wire, arrived, paired=pairs is not None)

    def _combine(self, rows: Tensor, pairs: Tensor | None, handle: TwoHopHandle) -> tuple[Tensor, ...]:
        values = [] if pairs is None else [handle.copies.scattered(pairs)]
        wire = Format.of((rows, *values))
        hop1, hop2 = f"combine hop 1 of {handle.label}", f"combine hop 2 of {handle.label}"
        with self.buffers.scratch(wire.words, rows.device) as take:
            departing = self._summed_here(wire, rows, values, handle, take)
            own, *others = handle.stages(departing)
            # Hop 2 backwards: rows of other nodes' tokens to the ranks through which they arrived.
            leaving = [leg.back(self.intra, space, take(leg.sent), hop2) for leg, space in others]
            home = take(sum(leg.sent for leg in (handle.hop2[0], *handle.hop1)))
            near, *far = home.split([leg.sent for leg in (handle.hop2[0], *handle.hop1)])
            returning = []
            for leg, into, returned, add in zip(handle.hop1, far, leaving, handle.node_sums, strict=True):
                # The sum over this node's ranks, made before it crosses.
                summed = take(leg.received)
                for tensor, space in zip(wire.unpack(returned.wait()), wire.unpack(summed), strict=True):
                    add(tensor, space)
                returning.append(leg.back(self.inter, summed, into, hop1))
            returning.append(own[0].back(self.intra, own[1], near, hop2))
            for part in returning:
                part.wait()
            return tuple(handle.token_sum(tensor) for tensor in wire.unpack(home))

    @staticmethod
    def _summed_here(
        wire: Format, rows: Tensor, values: Sequence[Tensor], handle: TwoHopHandle, take: Callable[[int], Tensor]
    ) -> Tensor:
        """Wire rows of what this rank's experts add up to, one for each row that arrived."""
        departing = take(handle.copies.arrived[0])
        sums, *spaces = wire.unpack(departing)
        handle.copies.rank_sum(rows, sums)
        for space, value in zip(spaces, values, strict=True):
            space.copy_(value)
        return departing
