"""Memory that ranks open to each other, over a stand-in of torch's symmetric memory: all ranks have it, or none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from dryvine.comm import copy_links, local

CPU = torch.device("cpu")


def opened(rank: int, fault: str) -> tuple[bool, bool]:
    """For `local.run`: whether rank 1, which has the fault, or rank 0 got links, and whether a rendezvous was begun.
    In one, a rank waits for all others, as in torch's."""
    begun = []

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if rank == 1 and fault == "memory":
            raise torch.OutOfMemoryError("no room")
        return torch.zeros(size, dtype=dtype)

    def rendezvous(own: Tensor, group: str) -> SimpleNamespace:
        begun.append(rank)
        dist.barrier()
        if rank == 1 and fault == "rendezvous":
            raise RuntimeError("no peer access")
        return SimpleNamespace(get_buffer=lambda r, size, dtype: torch.zeros(size, dtype=dtype))

    symmetric.empty, symmetric.rendezvous = empty, rendezvous
    if rank == 1 and fault == "words":
        copy_links.share_words.__globals__["_open"] = lambda *_: None
    links = copy_links.open_links((0, 1), dist.group.WORLD, 64, 4, CPU)
    assert links is None or [len(links.memory(r)) for r in (0, 1)] == [64, 64]
    return links is not None, bool(begun)


@pytest.mark.parametrize(
    ("fault", "found"),
    [("", (True, True)), ("memory", (False, False)), ("words", (False, False)), ("rendezvous", (False, True))],
)
def test_all_ranks_have_links_or_none(fault: str, found: tuple[bool, bool]) -> None:
    """One that has no memory says so before the others wait for it in a rendezvous."""
    assert local.run(opened, 2, fault, deadline=30) == [found] * 2
