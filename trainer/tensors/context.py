"""The type of `ctx` in an autograd Function: torch calls it Any, which would let a misspelt field pass."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """What forward leaves its backward. A Function with fields of its own declares them in a subclass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def for_later(ctx: Context) -> tuple[Tensor, ...]:
    """The saved tensors without their history, for a deferred weight gradient, which would keep the graph's inputs."""
    return tuple(t.detach() for t in ctx.saved_tensors)
