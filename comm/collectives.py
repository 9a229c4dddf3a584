"""The two collectives whose names changed: torch 2.13 deprecates `*_into_tensor` for `*_single`, which 2.11 lacks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def reduce_scatter(out: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
    """`out` gets this rank's equal slice of the sum of every rank's `whole`."""
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(out, whole, group=group)


def all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    """`out` gets every rank's `part`, in rank order."""
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, part, group=group)
