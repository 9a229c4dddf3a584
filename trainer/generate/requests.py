"""The requests and completions of a sampler: plain values that cross every boundary between rollouts and training.

A request carries its own seed, so its tokens are a function of the weights and of itself: not of what else is decoded
at the time, in which slot, in which order, or over how many ranks. A `Completion` also carries what an update needs:
the log-probabilities it was sampled with, and the experts that every token was routed to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Reason = Literal["stop", "length", "callback", "cancelled", "failed"]


@dataclass(frozen=True)
class Request:
    """`max_tokens` new tokens at most after `prompt`, token ids.

    `temperature` 0 takes the best token. `top_p` samples among the fewest best tokens that have so much probability
    together. Tokens depend on (`seed`, position) and on the weights, nothing else. A token of `stop` ends the
    completion and is part of it. Requests of one `group` share what their prompts begin with, which is computed once.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: frozenset[int] = frozenset()
    group: int | None = None


@dataclass(frozen=True)
class Completion:
    """`tokens` int64 [n]; `logprobs` FP32 [n], each of the softmax over the full vocabulary at the request's
    temperature (at 1 where that is 0), whatever `top_p` left out; `routes` int16 [MoE layers, len(prompt) + n - 1,
    top_k], the experts that each token that was fed chose, in the gate's order.

    `reason` "failed": `why` says what happened; what had been sampled until then is kept. When it speculates, MTP
    proposes `drafted` tokens, and of those the model then samples `accepted`.
    """

    request: Request
    tokens: Tensor
    logprobs: Tensor
    routes: Tensor
    reason: Reason
    why: str = ""
    drafted: int = 0
    accepted: int = 0
