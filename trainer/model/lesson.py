"""What a microbatch is to learn in place of its next tokens: an objective on their log-probabilities, and experts that
were chosen before (reinforcement learning). The model computes what an objective needs and knows none.

Replaying a choice (R3: arXiv 2510.11370) takes the experts and nothing else: their weights are computed from the scores
of now, so the gate learns as ever. Choices by a slightly different arithmetic, or by weights of before, differ in every
tenth gate, and then old and new probabilities of a token are those of two different networks.

Legend: N tokens, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Scored(NamedTuple):
    """What the head knows of each target, FP32 [N]."""

    logprobs: Tensor  # of the softmax over the whole vocabulary at the lesson's temperature, with gradient
    entropies: Tensor  # of that softmax, in nats, without


# -> what to record, by name. Of these, what has a gradient is a loss.
Objective = Callable[[Scored], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Lesson:
    """`experts` are by MoE block, int64 [N, K]; a token whose first is negative chooses for itself, and so do blocks
    that are not named. `record`: the choices of every gate are recorded as `routes.BLOCK`, int16 [N, K]."""

    objective: Objective
    temperature: float = 1.0
    experts: Mapping[str, Tensor] = field(default_factory=dict)
    record: bool = False
