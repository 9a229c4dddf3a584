"""Weight gradients as closures: a Linear's backward computes dX and puts the computation of dW here, to be run later.

Zero-bubble and DualPipe schedules need dX as early as possible and dW whenever the rank would idle. Splitting the
autograd graph for that (torch's `stage_backward_input` / `stage_backward_weight`) runs custom autograd functions
twice and takes time quadratic in depth; a closure costs one append.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Closure = Callable[[], None]


class WGrad:
    """Collects the closures of the backward that runs. One object per rank, handed to every layer that needs it."""

    def __init__(self) -> None:
        self._into: list[Closure] | None = None

    def put(self, closure: Closure) -> None:
        """Called by a layer's backward. Outside `collect` the closure runs at once, as plain autograd would."""
        if self._into is None:
            closure()
        else:
            self._into.append(closure)

    @contextmanager
    def collect(self) -> Iterator[list[Closure]]:
        """The list of what is put while the context is open; the caller owns it, and runs and drops the closures."""
        before, self._into = self._into, []
        try:
            yield self._into
        finally:
            self._into = before
