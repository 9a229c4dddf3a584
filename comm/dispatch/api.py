"""The contract of the expert all-to-all: `Dispatcher` and its `Handle`.

Comm moves rows and knows nothing of models. A layout (who gets which row) is worked out once per microbatch and layer
by `Dispatcher.layout`; the `Handle` that it gives is a value that serves dispatch and combine, forward and backward:
the backward of dispatch is combine and the backward of combine is dispatch, with the same handle, so no counts travel
twice and only the layout ever makes the host wait. (The alternative, counts inside `dispatch`, makes its backward a
different function from `combine` and hides the host sync where nobody can schedule it.)

Legend: T tokens of this rank, K experts per token (top-k), R rows that this rank's experts get (one per token-expert
pair), X local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from dryvine.comm.pending import Pending


class Handle(Protocol):
    """Where each row went. `counts` are the rows of each local expert, on the host, in expert order."""

    @property
    def counts(self) -> Sequence[int]: ...


class Dispatcher(Protocol):
    """The expert all-to-all of one expert-parallel group. Collective: every rank of the group calls in the same order.

    No token is dropped; a rank may have zero tokens and an expert zero rows.
    """

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[Any]:
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
