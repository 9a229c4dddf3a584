"""Wire buffers that a CPU rank uses again.

A fresh buffer costs more to map than a row costs to copy: the kernel zeroes each page at first touch, and gloo would
touch them while the peer waits. GPUs need none of this, since torch's allocator there caches the memory itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dryvine.comm.dispatch.payload import WORD


class StagingBuffers:
    """Free buffers by size. One that is taken and never given back is garbage like any tensor."""

    def __init__(self, limit: int = 16) -> None:
        self._free: list[Tensor] = []
        self._limit = limit

    def take(self, rows: int, words: int, device: torch.device) -> Tensor:
        """An uninitialised buffer [rows, words]: the smallest free one that holds it without wasting half."""
        need = rows * words
        fitting = [flat for flat in self._free if need <= flat.numel() <= 2 * need]
        if device.type != "cpu" or not fitting:
            return torch.empty((rows, words), dtype=WORD, device=device)
        best = min(fitting, key=Tensor.numel)
        self._free = [flat for flat in self._free if flat is not best]
        return best[:need].view(rows, words)

    @contextmanager
    def scratch(self, words: int, device: torch.device) -> Iterator[Callable[[int], Tensor]]:
        """A function from rows to a buffer [rows, words]; all are given back at the end."""
        taken: list[Tensor] = []

        def take(rows: int) -> Tensor:
            taken.append(self.take(rows, words, device))
            return taken[-1]

        yield take
        self.give(*taken)

    def give(self, *buffers: Tensor) -> None:
        """Make them free again: the caller must not read them any more. Beyond the limit the smallest are dropped."""
        full = [torch.empty(0, dtype=WORD).set_(b.untyped_storage()) for b in buffers if b.device.type == "cpu"]
        self._free = sorted([*self._free, *full], key=Tensor.numel)[-self._limit :]
