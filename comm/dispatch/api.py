"""The contract of the expert all-to-all: `Dispatcher` and its `Handle`.

A dispatcher moves rows and knows nothing of models. The routing (which rank gets which row) is worked out once per
microbatch and layer by `plan_routing`; the handle it returns is a value that serves dispatch and combine, forward and
backward: the backward of dispatch is combine and the backward of combine is dispatch, with the same handle, so no
counts travel twice and only `plan_routing` makes the host wait. (With counts inside `dispatch`, its backward would be
another function than `combine`, and the wait of the host would be where nobody can schedule work for it.)

Legend: T tokens of this rank, K experts per token (top-k), R rows that this rank's experts receive (one per
token-expert pair), X local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import Tensor

from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.pending import Pending


class Handle(Protocol):
    """Where each row goes. Callers read `counts` and pass the rest back."""

    @property
    def counts(self) -> Sequence[int]:
        """Rows of each local expert, [X] in expert order, padding to the alignment included: on the host, or
        `DeviceCounts` where the host need not know them. While ops are recorded, not before the first dispatch."""
        ...


H = TypeVar("H", bound=Handle)


class Dispatcher(Protocol[H]):
    """The expert all-to-all of one expert-parallel group. Collective: every rank of the group makes the same calls in
    the same order.

    No token is dropped; a rank may have zero tokens and an expert zero rows. A rank that is lost raises CommError.
    """

    @property
    def meter(self) -> Meter:
        """Counts every byte that the dispatcher sends."""
        ...

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[H]:
        """Work out where rows go, from the global expert number of each token's choices (int64 [T, K], all different
        within a row; else every rank raises ValueError). The only call that reads counts on the host. `label` names
        layer and microbatch in errors."""
        ...

    def dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: H) -> Pending[tuple[Tensor, ...]]:
        """Send row t of each tensor in `rows` ([T, ...]) to every expert that token t chose, and value (t, k) of
        `pairs` ([T, K]) with it. Returns the tensors as [R, ...], by local expert, then source rank, then token, and
        after them `pairs` as [R] if given. Padding rows are zero."""
        ...

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: H) -> Pending[tuple[Tensor, ...]]:
        """The mirror of dispatch: sum the rows ([R, ...]) of each token over its experts, in FP32, and return
        ([T, ...],) in the rows' dtype; `pairs` ([R]) come back unsummed as [T, K]."""
        ...


# A dispatcher with any type of handle; the caller only keeps it and passes it back.
AnyDispatcher: TypeAlias = Dispatcher[Any]
