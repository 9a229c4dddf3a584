"""Recomputation of single tensors: the output of a cheap function is not kept for the backward but recomputed there.

`torch.utils.checkpoint` drops all tensors saved in its function and reruns all of it. To drop a norm's output it must
enclose the Linear that saves it, and for the outputs of the MLA up-projections the attention core, so that a GEMM and
an attention run twice for nothing. Here only the given tensors are dropped: while `use` runs, an operator that saves
one of them saves its number instead, and the first that unpacks it calls `make` again (DeepSeek-V3, section 3.2.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
Make = Callable[[], tuple[Tensor, ...]]
Identity = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


def _identity(tensor: Tensor) -> Identity:
    """Identifies a tensor by its memory, since autograd packs a new alias of it; valid while `use` runs."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class _Remaker:
    """The saved-tensor hooks of one `through`. The graph keeps it, and recomputed tensors until the last reference has
    been unpacked: a graph that is retained for another backward keeps no more than after its forward."""

    def __init__(self, make: Make, made: tuple[Tensor, ...]) -> None:
        self.make = make
        self.numbers = {_identity(t): i for i, t in enumerate(made)}
        self.again: tuple[Tensor, ...] = ()
        self.places = self.left = 0  # saved in place of a tensor; of those, still to be unpacked

    def pack(self, tensor: Tensor) -> Tensor | int:
        number = self.numbers.get(_identity(tensor))
        if number is None:
            return tensor
        self.places += 1
        self.left += 1
        return number

    def unpack(self, saved: Tensor | int) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if not self.again:
            with torch.no_grad():
                self.again = self.make()
        made = self.again[saved]
        self.left -= 1
        if not self.left:
            self.again, self.left = (), self.places
        return made


def through(make: Make, use: Callable[..., R], again: bool, remake: Make | None = None) -> R:
    """use(*make()). With `again`, tensors of `make` that `use` saves for the backward are recomputed there, bitwise
    equal.

    `make` must be pure and capture only tensors that the backward keeps anyway. `remake`, if given, is called instead
    in the backward, for a `make` that does more than return the tensors.
    """
    made = make()
    if not (again and torch.is_grad_enabled()):
        return use(*made)
    remaker = _Remaker(remake or make, made)
    with torch.autograd.graph.saved_tensors_hooks(remaker.pack, remaker.unpack):
        return use(*made)
