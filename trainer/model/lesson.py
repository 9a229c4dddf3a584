"""A training objective on log-probabilities that replaces next-token prediction, and expert choices to replay: for
reinforcement learning. The model computes the inputs of an objective and is independent of which one it is.

Replay (R3: arXiv 2510.11370) uses the recorded experts only: their weights are computed from the current scores, so the
gate is trained as usual. With slightly different arithmetic, or older weights, choices differ in every tenth gate, and
old and new probabilities of a token are then those of two different networks.

Legend: N tokens, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Scored(NamedTuple):
    """The head's results for each target, FP32 [N]."""

    logprobs: Tensor  # of the softmax over the whole vocabulary at the lesson's temperature, with gradient
    entropies: Tensor  # of that softmax, in nats, without gradient


# -> what to record, by name. Of these, what has a gradient is a loss.
Objective = Callable[[Scored], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Lesson:
    """`experts` are the choices to replay, int64 [N, K] by MoE block; tokens whose first is negative, and blocks that
    are not named, are routed as usual. `record`: the choices of every gate are recorded as `routes.BLOCK`, int16
    [N, K]."""

    objective: Objective
    temperature: float = 1.0
    experts: Mapping[str, Tensor] = field(default_factory=dict)
    record: bool = False
