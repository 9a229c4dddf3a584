"""What is under way: a result that a caller may start now and wait for later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

U = TypeVar("U")
V = TypeVar("V", covariant=True)


class Pending(Generic[V]):
    """A result under way. `wait` may be called once; it gives the result, finished on this stream or thread.

    `ready` tells whether `wait` would return at once, so that whoever waits may do something useful meanwhile.
    """

    def __init__(self, finish: Callable[[], V], ready: Callable[[], bool] = lambda: True) -> None:
        self._finish, self.ready = finish, ready

    def wait(self) -> V:
        return self._finish()

    def then(self, make: Callable[[V], U]) -> Pending[U]:
        """What `make` makes of the result, made in `wait`."""
        return Pending(lambda: make(self.wait()), self.ready)

    @staticmethod
    def done(value: U) -> Pending[U]:
        return Pending(lambda: value)
