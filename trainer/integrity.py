"""Finds a GPU that computes wrongly: copies of the same weights are compared bit by bit, every so many steps.

Every copy of a parameter (both ranks of a DualPipe stage, all data ranks) was given the same bits by the same gather,
which are those of its owner's FP32 masters, rounded. So any difference is damage, and no tolerance is needed: a copy
that is not what the masters round to is bad, and where all copies agree and the masters do not, the masters are. A rank
reads its weights once and sends two numbers a parameter. Sums over ranks, as the loss is, would notice and name nobody.
Moments have one owner each and nothing to be compared with.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from dryvine.parallel.bucket import Bucket
from dryvine.parallel.zero import Zero
from dryvine.trainer.nonfinite import Diverged

SHOWN = 4  # copies in a message
PART = 1 << 22  # words of a tensor that are widened to 64 bits at a time
Sums = tuple[int, int]


class Held(NamedTuple):
    """What a rank holds of the part of a parameter that one rank owns."""

    name: str
    first: int  # element in the whole parameter
    weights: Sums
    masters: Sums | None  # of the owner: what its masters round to


class CorruptWeights(Diverged):
    """Copies of the same weights differ."""


def check_copies(zero: Zero) -> None:
    """Raise CorruptWeights, on all ranks the same, that names rank, host and tensor of what differs. Collective."""
    zero.settle()
    own = [held for bucket in zero.buckets for held in _held(bucket)]
    every = cast(list[tuple[str, list[Held]]], zero.mesh.gather((socket.gethostname(), own), "sums of weights"))
    if bad := list(_differing(every)):
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise CorruptWeights(
            f"copies of the same weights differ: {'; '.join(bad[:SHOWN])}{more}; leave that host out, which computes "
            f"or keeps them wrongly, and the same command goes on from the last checkpoint"
        )


def sums(values: Tensor) -> Sums:
    """Of all bits of a tensor in any dtype: its words added up, and with each counted by its place. A change of one
    word changes the first; integers wrap, and are the same on every device."""
    raw = values.detach().contiguous().flatten().view(torch.uint8)
    words = raw.view(torch.int16) if raw.numel() % 2 == 0 else raw
    total = torch.zeros(2, dtype=torch.int64, device=values.device)
    for start in range(0, len(words), PART):
        wide = words[start : start + PART].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + len(wide), device=values.device)
        total += torch.stack((wide.sum(), (wide * places).sum()))
    first, second = total.tolist()
    return first, second


def _held(bucket: Bucket) -> Iterator[Held]:
    """Of each member, the part in each shard of the bucket."""
    size, own = bucket.master.numel(), bucket.own
    for member in bucket.members:
        at = member.at
        end = at + member.parameter.numel()
        for start in range(at // size * size, end, size):
            low, high = max(at, start), min(end, start + size)
            rounded = None
            if start == own.start:
                masters = bucket.master[low - start : high - start].to(bucket.values.dtype)
                rounded = sums(masters)
            yield Held(member.name, member.first + low - at, sums(bucket.values[low:high]), rounded)


def _differing(every: list[tuple[str, list[Held]]]) -> Iterator[str]:
    copies: defaultdict[tuple[str, int], dict[int, Held]] = defaultdict(dict)
    for rank, (_, parts) in enumerate(every):
        for held in parts:
            copies[held.name, held.first][rank] = held
    for (name, _), by_rank in copies.items():
        owner, masters = next((rank, held.masters) for rank, held in by_rank.items() if held.masters is not None)
        others = {held.weights for held in by_rank.values()}
        if len(by_rank) > 1 and len(others) == 1 and masters not in others:
            yield f"masters of {name} on rank {owner} ({every[owner][0]})"
            continue
        for rank, held in by_rank.items():
            if held.weights != masters:
                yield f"{name} on rank {rank} ({every[rank][0]})"
