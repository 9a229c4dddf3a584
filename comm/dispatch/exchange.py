"""One all-to-all of rows inside one group: any split sizes, asynchronous; no network where the group is one rank.

Every byte that `flat`, `hierarchical` and the rounds send passes here, so here it is counted by link class and given
its deadline. Dispatchers take an exchange instead of a process group: tests run them on threads, MPI is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.pending import Pending
from dryvine.comm.posted import Posted
from dryvine.comm.topology import LinkClass
from dryvine.comm.watch import Watch


class Exchange(Protocol):
    """The all-to-alls of one group. Collective and in order, like the calls of a dispatcher."""

    @property
    def size(self) -> int: ...

    @property
    def meter(self) -> Meter: ...

    def start(
        self, rows: Tensor, sends: Sequence[int], receives: Sequence[int], into: Tensor | None = None, what: str = ""
    ) -> Pending[Tensor]:
        """Send the first `sends[0]` rows of `rows` [N, ...] to rank 0, the next `sends[1]` to rank 1, ...; returns the
        rows that arrive, [sum(receives), ...], by source rank.

        They are written to `into` if given: contiguous, of that shape. `what` names the operation in errors.
        """
        ...


def own_links(size: int, rank: int) -> list[LinkClass]:
    """The link to each rank of a group that lies on one node."""
    return ["self" if other == rank else "intra" for other in range(size)]


class GroupExchange:
    """An Exchange over a torch process group; None is a group of this rank alone and needs no torch.distributed."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        links: Sequence[LinkClass] = (),
        meter: Meter | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`links` is the class of link to each rank of the group, by default of one node; without `watch` torch's own
        deadlines apply."""
        self.group, self.watch, self.meter = group, watch, meter or Meter()
        self.size = group.size() if group else 1
        self.rank = group.rank() if group else 0
        self.links = links or own_links(self.size, self.rank)
        self.world_ranks = dist.get_process_group_ranks(group) if group else []

    def start(
        self, rows: Tensor, sends: Sequence[int], receives: Sequence[int], into: Tensor | None = None, what: str = ""
    ) -> Pending[Tensor]:
        row_bytes = rows.shape[1:].numel() * rows.element_size()
        self.meter.add(self.links, sends, row_bytes)
        if self.group is None:
            return Pending.done(rows if into is None else into.copy_(rows))
        arrived = rows.new_empty((sum(receives), *rows.shape[1:])) if into is None else into
        sources = zip(self.world_ranks, receives, strict=True)
        due = tuple((r, n * row_bytes) for r, n in sources if r != self.world_ranks[self.rank])

        def post() -> list[dist.Work | None]:
            return [dist.all_to_all_single(arrived, rows, list(receives), list(sends), group=self.group, async_op=True)]

        posted = Posted(self.watch, what, due, post, arrived.is_cuda)

        def finish() -> Tensor:
            posted.wait(whole=False)
            rows.size()  # the closure holds what is being sent until it has left
            return arrived

        return Pending(finish, posted.ready)
