"""Initial weights that do not depend on the layout: each tensor, and each expert, has a random stream of its own.

A stream is seeded by a hash of (seed, global name, expert number); numbers are drawn on the CPU in FP32 and rounded
once. One stream for each rank, or for a stack of experts, would make another model on every mesh, and no two layouts
could be compared.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from dryvine.trainer.tensors.weight import Weight


def _stream(seed: int, name: str, expert: int | None = None) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{expert}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


@torch.no_grad()
def initialise(name: str, weight: Weight, seed: int, std: float, first_expert: int) -> None:
    """Vectors (norms) are 1, matrices normal(0, std), experts one by one, the first being number `first_expert`."""
    if weight.dim() == 1:
        weight.fill_(1)
    elif weight.expert:
        for number, one in enumerate(weight, first_expert):
            one.copy_(_normal(one, std, _stream(seed, name, number)))
    else:
        weight.copy_(_normal(weight, std, _stream(seed, name)))


def _normal(like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32).normal_(0, std, generator=generator)
