"""The collectives of a training step, each with a deadline and a name. They also hide a rename: torch 2.13 deprecates
`*_into_tensor` for `*_single`, which 2.11 lacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import Tensor

from dryvine.comm.posted import Posted
from dryvine.comm.roll_call import Due
from dryvine.comm.watch import Watch, naming


def all_reduce(
    values: Tensor, op: dist.ReduceOp.RedOpType, watch: Watch | None, what: str, world: dist.ProcessGroup | None = None
) -> None:
    """Reduce `values` over all ranks, in place. `world` None: by torch's own group of them."""
    ranks = dist.get_process_group_ranks(world)
    with naming(watch, f"{what} over ranks {_spans(ranks)}", _due(ranks, values), on_device=values.is_cuda):
        dist.all_reduce(values, op=op, group=world)


def barrier(watch: Watch | None, what: str, world: dist.ProcessGroup | None = None) -> None:
    """Wait for every rank; the host does."""
    with naming(watch, what, tuple((rank, 0) for rank in range(dist.get_world_size()))):
        dist.barrier(group=world)


def reduce_scatter(out: Tensor, full: Tensor, group: dist.ProcessGroup, watch: Watch | None, what: str) -> Posted:
    """Start to write this rank's slice of the sum of all ranks' `full` to `out`; slices are equal, in rank order."""
    call = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    return _post(lambda: call(out, full, group=group, async_op=True), watch, what, group, out)


def all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup, watch: Watch | None, what: str) -> Posted:
    """Start to write every rank's `part` to `out`, in rank order."""
    call = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    return _post(lambda: call(out, part, group=group, async_op=True), watch, what, group, part)


def exchange(out: Tensor, full: Tensor, group: dist.ProcessGroup, watch: Watch | None, what: str) -> Posted:
    """Start to send each rank its slice of `full`, and to write what the others send to `out`; in rank order."""
    part = out[: len(out) // group.size()]
    return _post(lambda: dist.all_to_all_single(out, full, group=group, async_op=True), watch, what, group, part)


def shift(out: Tensor, part: Tensor, group: dist.ProcessGroup, watch: Watch | None, what: str) -> Posted:
    """Begin to send `part` to the next rank of the group, the last one's to the first, and to write what the one before
    sends, as many elements, to `out`."""
    here, size = dist.get_rank(group), group.size()
    to_next, from_before = ([0] * size for _ in range(2))
    to_next[(here + 1) % size] = from_before[here - 1] = len(part)
    call = partial(dist.all_to_all_single, out, part, from_before, to_next, group=group, async_op=True)
    return _post(call, watch, what, group, part)


def _post(
    post: Callable[[], dist.Work | None], watch: Watch | None, what: str, group: dist.ProcessGroup, part: Tensor
) -> Posted:
    """Post a collective to which every other rank of the group contributes `part`."""
    ranks = dist.get_process_group_ranks(group)
    return Posted(watch, f"{what} over ranks {_spans(ranks)}", _due(ranks, part), lambda: [post()], part.is_cuda)


def _due(ranks: list[int], part: Tensor) -> Due:
    return tuple((rank, part.nbytes) for rank in ranks if rank != dist.get_rank())


def _spans(ranks: list[int]) -> str:
    """The ranks as short text: `0, 8, 16, 24` or `0, 1, .. 63`."""
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, .. {ranks[-1]}"
