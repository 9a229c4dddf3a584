"""A result in progress: started now, waited for later.

torch's `Work` and `Future` do this for one collective; a dispatch is several, with tensor operations between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

U = TypeVar("U")
V = TypeVar("V", covariant=True)


class Pending(Generic[V]):
    """`wait` may be called once; it returns the result, finished on this stream or thread.

    `ready` is whether `wait` would return at once, so that the caller may do something useful in the meantime.
    """

    def __init__(self, finish: Callable[[], V], ready: Callable[[], bool] = lambda: True) -> None:
        self._finish, self.ready = finish, ready

    def wait(self) -> V:
        return self._finish()

    def then(self, make: Callable[[V], U]) -> Pending[U]:
        """`make` applied to the result, in `wait`."""
        return Pending(lambda: make(self.wait()), self.ready)

    @staticmethod
    def done(value: U) -> Pending[U]:
        return Pending(lambda: value)
