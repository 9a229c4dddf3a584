"""The process groups of a run, made once and handed down as one frozen value.

Ranks are numbered ((pp * DP) + dp) * EP + ep: the expert-parallel ranks are neighbours, so that the expert all-to-all
stays inside as few nodes as it can. The expert-parallel ranks are data-parallel for everything except the experts; the
data rank is dp * EP + ep. A process-wide registry of groups, as other trainers keep, would save passing one argument
and cost every test that wants two meshes in one process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import NamedTuple

import torch
import torch.distributed as dist

from dryvine.comm.collectives import all_reduce, barrier
from dryvine.comm.groups import GroupsByRanks, new_groups
from dryvine.comm.lines import Channel
from dryvine.comm.watch import Watch, naming

# Of a GPU, for one pipeline message over NCCL. 2 carry 62 GB/s each way between two H100s, more than a network card;
# a receive that is posted early spins on all that it has.
MESSAGE_SMS = 2


@dataclass(frozen=True)
class Mesh:
    """This rank's place among pp x dp x ep ranks, and its groups. A group of one rank is None."""

    pp: int
    dp: int
    ep: int
    rank: int
    device: torch.device
    # The expert-parallel group.
    experts: dist.ProcessGroup | None
    # Those of this rank's pipeline; True: for messages to a higher pipeline rank.
    channels: dict[tuple[Channel, bool], dist.ProcessGroup]
    timeout: timedelta = timedelta(seconds=600)
    # SMs of a GPU that the expert all-to-all may take; None: NCCL's choice.
    sms: int | None = None
    watch: Watch | None = None  # None: torch's own deadlines
    world: dist.ProcessGroup | None = None  # of all ranks; None: torch's own

    @property
    def size(self) -> int:
        return self.pp * self.dp * self.ep

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.dp * self.ep)

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep

    @property
    def data_rank(self) -> int:
        return self.rank % (self.dp * self.ep)

    @property
    def data_ranks(self) -> int:
        return self.dp * self.ep

    def global_rank(self, pp_rank: int) -> int:
        """The world rank of stage-neighbour `pp_rank` in this rank's pipeline."""
        return pp_rank * self.dp * self.ep + self.data_rank

    def ranks(self, pp_ranks: Iterable[int], ep_rank: int | None = None) -> tuple[int, ...]:
        """World ranks that hold a parameter of `pp_ranks`: all data ranks, or those of one ep rank for its experts."""
        return tuple(
            (p * self.dp + d) * self.ep + e
            for p in sorted(pp_ranks)
            for d in range(self.dp)
            for e in range(self.ep)
            if ep_rank is None or e == ep_rank
        )

    def new_groups(self, families: Iterable[tuple[int, ...]], sms: int | None = None) -> GroupsByRanks:
        """More groups of this run, with its timeout; see `groups.new_groups`. Collective over the world."""
        return new_groups(families, self.timeout, sms)

    def sum(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """Sum over the world, in place. `what` is summed, for errors; as in the other collectives."""
        if self.size > 1:
            all_reduce(values, dist.ReduceOp.SUM, self.watch, f"sum of {what}", self.world)
        return values

    def max(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """Maximum over the world, in place."""
        if self.size > 1:
            all_reduce(values, dist.ReduceOp.MAX, self.watch, f"maximum of {what}", self.world)
        return values

    def barrier(self, what: str) -> None:
        """Wait for every rank of the world."""
        if self.size > 1:
            barrier(self.watch, what, self.world)

    def gather(self, value: object, what: str) -> list[object]:
        """Every rank's `value`, in rank order. Pickles: for set-up, not for steps."""
        if self.size == 1:
            return [value]
        out: list[object] = [None] * self.size
        with naming(self.watch, f"gathering {what}", tuple((rank, 0) for rank in range(self.size))):
            dist.all_gather_object(out, value, group=self.world)
        return out


class Layout(NamedTuple):
    """What a mesh is made of: pp x dp x ep ranks."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    routes: int = 1  # orders in which microbatches pass the pipeline ranks: 2 for DualPipe


def make_mesh(layout: Layout, device: torch.device, timeout: timedelta, sms: int | None = None) -> Mesh:
    """Make every group of the run. Collective; the world must already be initialised unless it is one process.

    Each pipeline gets a communicator per route, direction and sense, so that activations never queue behind gradients,
    nor, where a V has stages on both ways between two ranks, a send behind a receive that was posted early.

    `sms` is how many SMs of a GPU the expert all-to-all may take at once. GEMMs are told to leave them free, for the
    whole process; scaled_mm on Hopper does, for others it is a hint. On a CPU it has no effect.
    """
    pp, dp, ep, routes = layout
    size = pp * dp * ep
    rank = dist.get_rank() if size > 1 else 0
    budget = sms if device.type == "cuda" else None
    if budget is not None:
        torch._C._set_sm_carveout_experimental(budget)
    expert_families = [tuple(range(first, first + ep)) for first in range(0, size, ep)]
    experts = new_groups(expert_families, timeout, budget).get(expert_families[rank // ep])
    pipelines = [tuple(range(first, size, dp * ep)) for first in range(dp * ep)]
    channels: dict[tuple[Channel, bool], dist.ProcessGroup] = {}
    message_sms = MESSAGE_SMS if device.type == "cuda" else None
    for route, direction, rising in product(range(routes), ("down", "up"), (False, True)):
        for group in new_groups(pipelines, timeout, message_sms).values():
            channels[(route, direction), rising] = group
    return Mesh(pp, dp, ep, rank, device, experts, channels, timeout, budget)
