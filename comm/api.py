"""What comm offers to the rest: `Wire` between stages, `Dispatcher` between experts, `Pending` for what is under way.

Comm moves rows and knows nothing of models. A layout (who gets which row) is worked out once per microbatch and layer
by `Dispatcher.layout`; the `Handle` that it gives is a value that serves dispatch and combine, forward and backward:
the backward of dispatch is combine and the backward of combine is dispatch, with the same handle, so no counts travel
twice and only the layout ever makes the host wait. (The alternative, counts inside `dispatch`, makes its backward a
different function from `combine` and hides the host sync where nobody can schedule it.)

Legend: T tokens of this rank, K experts per token (top-k), R rows that this rank's experts get (one per token-expert
pair), X local experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

U = TypeVar("U")
V = TypeVar("V")


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
    def done(value: V) -> Pending[V]:
        return Pending(lambda: value)


class Handle(Protocol):
    """Where each row went. `counts` are the rows of each local expert, on the host, in expert order."""

    @property
    def counts(self) -> Sequence[int]: ...


class Dispatcher(Protocol):
    """The expert all-to-all of one expert-parallel group. Collective: every rank of the group calls in the same order.

    No token is dropped; a rank may have zero tokens and an expert zero rows.
    """

    def layout(self, experts_TK: Tensor, label: str = "") -> Pending[Any]:
        """Work out where rows go from the global expert number of each token's choices (int64 [T, K], all different
        within a row). Gives a Handle. The only call that reads counts on the host. `label` (layer, then microbatch)
        names the traffic in errors and metrics."""
        ...

    def dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: Any) -> Pending[tuple[Tensor, ...]]:
        """Send row t of each tensor in `rows` ([T, ...]) to every expert that token t chose, and value (t, k) of
        `pairs` ([T, K]) with it. Gives the tensors as [R, ...], grouped by local expert, then pairs as [R] if given."""
        ...

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: Any) -> Pending[tuple[Tensor, ...]]:
        """The mirror: sum the rows ([R, ...]) of each token over its experts, in FP32, giving ([T, ...],) in the rows'
        dtype; `pairs` ([R]) come back unsummed as [T, K]."""
        ...


class Wire(Protocol):
    """Stage-to-stage messages of one pipeline. A channel is (route, direction) and FIFO between each two ranks."""

    def send(self, tensors: tuple[Tensor, ...], target: int, channel: tuple[int, str]) -> Pending[None]:
        """Start sending to pipeline rank `target`; what is pending holds the tensors until they have left."""
        ...

    def receive(self, like: tuple[Tensor, ...], source: int, channel: tuple[int, str]) -> Pending[tuple[Tensor, ...]]:
        """Post a receive of tensors shaped as `like` (meta tensors will do)."""
        ...
