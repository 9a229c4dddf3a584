"""A training objective on log-probabilities that replaces next-token prediction, and expert choices to replay: for
reinforcement learning. The model computes the inputs of an objective and is independent of which one it is.

Replay (R3: arXiv 2510.11370) uses the recorded experts only: their weights are computed from the current scores, so the
gate is trained as usual. With slightly different arithmetic, or older weights, choices differ in every tenth gate, and
old and new probabilities of a token are then those of two different networks.

Legend: N tokens, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor


class Scored(NamedTuple):
    """The head's results for each target, FP32 [N]."""

    logprobs: Tensor  # of the softmax over the whole vocabulary at the lesson's temperature, with gradient
    entropies: Tensor  # of that softmax, in nats, without gradient


# The head's results and the lesson's columns -> what to record, by name. Of these, what has a gradient is a loss.
# Objectives that compute the same are equal, and the host reads no tensor in one: graphs contain it.
Objective = Callable[[Scored, tuple[Tensor, ...]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Lesson:
    """`columns` are what is known of each target, [N] each, on the device of the model. `experts` are the choices to
    replay, int64 [N, K] by MoE block; tokens whose first is negative, and blocks that are not named, are routed as
    usual, and none has a balance loss. `record`: the choices of every gate are recorded as `routes.BLOCK`, int16 [N,
    K]."""

    objective: Objective
    columns: tuple[Tensor, ...] = ()
    temperature: float = 1.0
    experts: Mapping[str, Tensor] = field(default_factory=dict)
    record: bool = False

    @property
    def kind(self) -> Hashable:
        """All but the tensors."""
        return self.objective, len(self.columns), self.temperature, tuple(self.experts), self.record

    def tensors(self) -> list[Tensor]:
        return [*self.columns, *self.experts.values()]

    def copied(self) -> Lesson:
        experts = {name: own.clone() for name, own in self.experts.items()}
        return replace(self, columns=tuple(column.clone() for column in self.columns), experts=experts)
