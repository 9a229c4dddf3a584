"""How surely a gate chooses: where two experts are almost tied, arithmetic of fewer bits may choose the other one, and
what follows differs by far more than rounding does.

So a reader that computes in fewer bits than FP32 can be held to its bound only where all gates choose surely. Widening
the bound instead, until it covers a swapped expert, would cover most mistakes too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dryvine.trainer.model.gate import group_ranks, in_best_groups, score
from dryvine.trainer.model.shape import Shape


def margins(logits_NE: Tensor, bias_E: Tensor, shape: Shape) -> Tensor:
    """FP32 [N]: by which part of itself the last score that was chosen is above the first that was not, of groups or of
    experts, whichever is closer. 0 is a tie."""
    biased_NE = score(logits_NE, shape) + bias_E
    of_experts = _gap(in_best_groups(biased_NE, shape), shape.top_k)
    if shape.groups == 1:
        return of_experts
    return torch.minimum(of_experts, _gap(group_ranks(biased_NE, shape), shape.group_limit))


def _gap(values: Tensor, chosen: int) -> Tensor:
    """Infinite where all are chosen."""
    if chosen == values.shape[1]:
        return torch.full_like(values[:, 0], float("inf"))
    last, first = values.topk(chosen + 1, -1).values[:, -2:].unbind(1)
    return (last - first) / last.abs()
