"""One all-to-all of rows inside one group: any split sizes, asynchronous; no network where the group is one rank.

Every byte that any dispatcher sends passes here, so here it is counted by link class and given its deadline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from dryvine.comm.pending import Pending
from dryvine.comm.watch import Watch


class Meter:
    """Bytes sent by link class: self (a copy), intra (inside the node), inter (between nodes)."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()

    def add(self, links: Sequence[str], rows: Sequence[int], row_bytes: int) -> None:
        for link, count in zip(links, rows, strict=True):
            self.bytes[link] += count * row_bytes

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        taken, self.bytes = self.bytes, Counter()
        return dict(taken)


class Exchange(Protocol):
    """The all-to-alls of one group. Collective and in order, like the calls of a dispatcher."""

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def meter(self) -> Meter: ...

    def start(
        self, rows: Tensor, sends: Sequence[int], receives: Sequence[int], into: Tensor | None = None, what: str = ""
    ) -> Pending[Tensor]:
        """Send the first `sends[0]` rows to rank 0, the next to rank 1, ...; gives the rows that came, by source.

        They come into `into` if given: contiguous, of sum(receives) rows. `what` names the operation in errors.
        """
        ...


class GroupExchange:
    """An Exchange over a torch process group; None is a group of this rank alone and needs no torch.distributed."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        links: Sequence[str] = (),
        meter: Meter | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`links` gives the class of link to each rank of the group; without `watch` torch's own deadlines apply."""
        self.group, self.watch, self.meter = group, watch, meter or Meter()
        self.size = group.size() if group else 1
        self.rank = group.rank() if group else 0
        self.links = links or ["self" if r == self.rank else "intra" for r in range(self.size)]
        self.world = dist.get_process_group_ranks(group) if group else []

    def start(
        self, rows: Tensor, sends: Sequence[int], receives: Sequence[int], into: Tensor | None = None, what: str = ""
    ) -> Pending[Tensor]:
        row_bytes = rows.shape[1:].numel() * rows.element_size()
        self.meter.add(self.links, sends, row_bytes)
        if self.group is None:
            return Pending.done(rows if into is None else into.copy_(rows))
        came = rows.new_empty((sum(receives), *rows.shape[1:])) if into is None else into
        due = tuple((w, n * row_bytes) for w, n in zip(self.world, receives, strict=True) if w != self.world[self.rank])
        try:
            work = dist.all_to_all_single(came, rows, list(receives), list(sends), group=self.group, async_op=True)
        except RuntimeError as broken:  # a peer was lost before: the post itself fails
            raise (self.watch.failed(what, due, 0.0, broken) if self.watch else broken) from broken
        assert work is not None
        awaited = self.watch.expect(what, due, work) if self.watch else None

        def finish() -> Tensor:
            if awaited is None or self.watch is None:
                work.wait()
            elif came.is_cuda:
                self.watch.wait_queued(awaited)
            else:
                self.watch.wait(awaited)
            rows.size()  # the closure holds what is being sent until it has left
            return came

        return Pending(finish, work.is_completed)
