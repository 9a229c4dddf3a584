"""A checksum of a tensor's bits: two integers, cheap to compute and equal on every device.

A cryptographic hash would run on the host, after a copy of everything; hardware faults are not an adversary.
"""

from __future__ import annotations

import torch
from torch import Tensor

PART = 1 << 22  # words of a tensor that are widened to 64 bits at a time
Sums = tuple[int, int]


def sums(values: Tensor) -> Sums:
    """The sum of a tensor's 16-bit words (bytes, if their number is odd), and the sum weighted by their places, as
    int64 with wrap-around. A change of one word changes the first; an exchange of two, the second."""
    first, second = bit_sums(values).tolist()
    return first, second


def bit_sums(values: Tensor) -> Tensor:
    """`sums` on the tensor's device: int64 [2]."""
    raw = values.detach().contiguous().flatten().view(torch.uint8)
    words = raw.view(torch.int16) if raw.numel() % 2 == 0 else raw
    total = torch.zeros(2, dtype=torch.int64, device=values.device)
    for start in range(0, len(words), PART):
        wide = words[start : start + PART].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + len(wide), device=values.device)
        total += torch.stack((wide.sum(), (wide * places).sum()))
    return total
