"""One all-to-all of rows inside one group: any split sizes, asynchronous, and no network where the group is one rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from dryvine.comm.api import Pending


class Exchange:
    """The all-to-alls of one group; `group` None is a group of this rank alone and needs no torch.distributed."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = group.size() if group else 1
        self.rank = group.rank() if group else 0

    def start(self, rows: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Pending[Tensor]:
        """Send the first `sends[0]` rows to rank 0, the next to rank 1, ...; gives the rows that came, by source."""
        if self.group is None:
            return Pending.done(rows)
        came = rows.new_empty((sum(receives), *rows.shape[1:]))
        work = dist.all_to_all_single(came, rows, list(receives), list(sends), group=self.group, async_op=True)
        assert work is not None

        def finish() -> Tensor:
            work.wait()
            rows.size()  # the closure holds what is being sent until it has left
            return came

        return Pending(finish)
