"""Collectives of the training step, each with its deadline and its name; and the two whose names changed: torch 2.13
deprecates `*_into_tensor` for `*_single`, which 2.11 lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from dryvine.comm.watch import Watch, naming


def all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType, watch: Watch | None, what: str) -> None:
    """Reduce `values` over the world, in place."""
    with _in_group(watch, what, None, values):
        dist.all_reduce(values, op=op)


def barrier(watch: Watch | None, what: str) -> None:
    """Wait for every rank of the world; the host does."""
    with naming(watch, what, tuple((rank, 0) for rank in range(dist.get_world_size()))):
        dist.barrier()


def reduce_scatter(out: Tensor, full: Tensor, group: dist.ProcessGroup, watch: Watch | None, what: str) -> None:
    """Write this rank's slice of the sum of every rank's `full` to `out`; slices are equal and in rank order."""
    with _in_group(watch, what, group, out):
        getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(out, full, group=group)


def all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup, watch: Watch | None, what: str) -> None:
    """Write every rank's `part` to `out`, in rank order."""
    with _in_group(watch, what, group, part):
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, part, group=group)


@contextmanager
def _in_group(watch: Watch | None, what: str, group: dist.ProcessGroup | None, part: Tensor) -> Iterator[None]:
    """Around a collective in which every other rank of the group owes `part`."""
    ranks = dist.get_process_group_ranks(group)
    due = tuple((rank, part.nbytes) for rank in ranks if rank != dist.get_rank())
    with naming(watch, f"{what} over ranks {_spans(ranks)}", due, on_device=part.is_cuda):
        yield


def _spans(ranks: list[int]) -> str:
    """The ranks, short: `0, 8, 16, 24` or `0, 1, .. 63`."""
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, .. {ranks[-1]}"
