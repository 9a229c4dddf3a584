"""Process groups: every communicator of a run is made here, in the same order on every rank.

torch requires that all ranks of the world call `new_group` for every group, members or not, in one order. Calling it on
the members only (`use_local_synchronization`) would be simpler, but torch then names groups by how many a rank already
has, and hangs where nodes are uneven.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

GroupsByRanks = dict[tuple[int, ...], dist.ProcessGroup]  # by their world ranks


def new_groups(
    families: Iterable[tuple[int, ...]], timeout: timedelta, sms: int | None = None, backend: str | None = None
) -> GroupsByRanks:
    """Make a group of each tuple of world ranks and return those that this rank is in; a tuple of one rank needs none.
    Collective over the world: `families` must be the same, in the same order, on every rank.

    `sms` is the most SMs of a GPU that the group's kernels may take at once; None leaves it to NCCL. `backend` None is
    that of the world.
    """
    mine: GroupsByRanks = {}
    for ranks in families:
        if len(ranks) > 1:
            options = None if sms is None else _within(sms, timeout)
            group = dist.new_group(list(ranks), timeout, backend, options)
            if dist.get_rank() in ranks:
                mine[ranks] = group
    return mine


def _within(sms: int, timeout: timedelta) -> dist.ProcessGroupNCCL.Options:
    """Options for a group whose kernels use at most `sms` SMs: NCCL runs one CTA per SM."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.config.max_ctas = sms
    return options
