"""Initial weights that are independent of the layout: each tensor, and each expert, has its own random generator.

A generator is seeded by a hash of (seed, global name, expert number); numbers are drawn on the CPU in FP32 and rounded
once. With one generator for each rank, or for a stack of experts, every mesh would have another model, and layouts
could not be compared.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from dryvine.trainer.tensors.weight import Weight


def _stream(seed: int, name: str, expert: int | None = None) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{expert}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def initial(name: str, size: tuple[int, ...], seed: int, std: float, expert: int | None = None) -> Tensor:
    """FP32 values of a parameter, or of one expert's slice of it: vectors (norms) are 1, matrices normal(0, std)."""
    if len(size) == 1:
        return torch.ones(size)
    return torch.empty(size).normal_(0, std, generator=_stream(seed, name, expert))


@torch.no_grad()
def initialise(name: str, weight: Weight, seed: int, std: float, first_expert: int) -> None:
    """Initialise a parameter in place; stacked experts one by one, the first being number `first_expert`."""
    if weight.expert:
        for number, one in enumerate(weight, first_expert):
            one.copy_(initial(name, tuple(one.shape), seed, std, number))
    else:
        weight.copy_(initial(name, tuple(weight.shape), seed, std))
