"""The gate: which experts a token goes to, with which weights, and the loss of an unbalanced sequence.

Balance is kept by a bias that is added for the choice alone (arXiv 2412.19437, section 2.1.2) and moved after each step
by the load of the global batch; so no large auxiliary loss bends the gradient, and the small sequence-wise loss guards
against a single skewed sequence.

In torch, forward and backward are 30 operators, with the loss 50, which take a GPU longer to start than to run; there
`route` is one kernel each way, and three small launches more for the loss (kernels/gate.py).

Legend: N = S * T tokens, S sequences, E routed experts, G groups of e experts, K choices per token, C = T * K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dryvine.comm.by_device import kernel_in
from dryvine.trainer.model.linear import linear_to_fp32
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.model.spec import Spec

Choice = tuple[Tensor, Tensor, Tensor | None]  # weights, experts, balance loss


class Gate(nn.Module):
    """FP32 logits, and the choice by them."""

    bias: Tensor  # FP32 [E]: state, but not trained by gradients
    load: Tensor  # int64 [E]: how often each expert was chosen since a reset

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.shape = spec.shape
        self.weight = spec.weight(spec.shape.routed, spec.shape.hidden)
        self.register_buffer("bias", torch.zeros(spec.shape.routed, device=spec.device))
        self.register_buffer("load", torch.zeros(spec.shape.routed, dtype=torch.int64, device=spec.device))

    def forward(self, x_NH: Tensor) -> Tensor:
        """-> logits, FP32 [N, E]."""
        return linear_to_fp32(x_NH, self.weight)

    def choose(self, logits_NE: Tensor, sequences: int, count: bool) -> Choice:
        """What `route` returns; `count`: choices add to `load`."""
        return route(logits_NE, self.bias, self.shape, sequences, self.load if count else None)

    def replay(self, logits_NE: Tensor, given_NK: Tensor, sequences: int) -> tuple[Choice, Tensor]:
        """What `route` returns for experts that were chosen before, where `given` has some, and on how many of those
        tokens the gate would choose another set now: int64 [2], these and all of them. Counts no load."""
        scores_NE = score(logits_NE, self.shape)
        own_NK = choose_experts(scores_NE.detach(), self.bias, self.shape)
        given_N1 = given_NK[:, :1] >= 0
        other_N = (own_NK.sort(-1).values != given_NK.sort(-1).values).any(-1) & given_N1.squeeze(1)
        choice = weigh(scores_NE, torch.where(given_N1, given_NK, own_NK), sequences, self.shape)
        return choice, torch.stack((other_N.sum(), given_N1.sum()))


@torch.no_grad()
def move_bias(bias_E: Tensor, load_E: Tensor, gamma: float) -> None:
    """Lower the bias by gamma where an expert's load of the global batch is above the mean, else raise it by gamma."""
    above = load_E.double() > load_E.double().mean()
    bias_E += torch.where(above, -gamma, gamma).to(bias_E)


@kernel_in("dryvine.trainer.model.kernels.gate")
def route(logits_NE: Tensor, bias_E: Tensor, shape: Shape, sequences: int, load_E: Tensor | None = None) -> Choice:
    """FP32 logits -> weights FP32 [N, K], experts int64 [N, K] by falling score + bias within the best groups, and the
    balance loss (None where shape.balance_alpha is 0). Adds to `load`, int64, how often each expert was chosen.

    Of equal experts a GPU takes the first; a CPU's topk promises nothing. A score that is NaN counts as the highest.
    """
    scores_NE = score(logits_NE, shape)
    experts_NK = choose_experts(scores_NE.detach(), bias_E, shape)
    if load_E is not None:
        chosen = experts_NK.flatten()
        load_E.scatter_add_(0, chosen, torch.ones_like(chosen))
    return weigh(scores_NE, experts_NK, sequences, shape)


def score(logits_NE: Tensor, shape: Shape) -> Tensor:
    """[N, E], of which the best are chosen."""
    return logits_NE.sigmoid() if shape.score == "sigmoid" else logits_NE.softmax(-1)


def weigh(scores_NE: Tensor, experts_NK: Tensor, sequences: int, shape: Shape) -> Choice:
    """What `route` returns, by the scores of the experts that were chosen."""
    weights_NK = scores_NE.gather(1, experts_NK)
    if shape.normalise:
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
    weights_NK = weights_NK * shape.route_scale
    return weights_NK, experts_NK, balance_loss(scores_NE, sequences, shape) if shape.balance_alpha else None


def choose_experts(scores_NE: Tensor, bias_E: Tensor, shape: Shape) -> Tensor:
    """The K experts of each token: int64 [N, K]. A group's rank is the sum of its two best biased scores (sigmoid, V3)
    or its best one (softmax, V2)."""
    return in_best_groups(scores_NE + bias_E, shape).topk(shape.top_k, -1).indices


def in_best_groups(biased_NE: Tensor, shape: Shape) -> Tensor:
    """[N, E]: -inf in all but the groups that a token may choose of."""
    if shape.groups == 1:
        return biased_NE
    ranks_NG = group_ranks(biased_NE, shape)
    best = ranks_NG.topk(shape.group_limit, -1).indices
    barred_NG = torch.ones_like(ranks_NG, dtype=torch.bool).scatter_(1, best, False)
    biased_NGe = biased_NE.unflatten(1, (shape.groups, -1))
    return biased_NGe.masked_fill(barred_NG.unsqueeze(-1), float("-inf")).flatten(1)


def group_ranks(biased_NE: Tensor, shape: Shape) -> Tensor:
    """[N, G], of which the highest are chosen."""
    return biased_NE.unflatten(1, (shape.groups, -1)).topk(shape.ranked_by, -1).values.sum(-1)


def balance_loss(scores_NE: Tensor, sequences: int, shape: Shape) -> Tensor:
    """alpha * sum_i f_i P_i (equations 17-20), the mean over the sequences; f counts each token's K best plain scores.

    sum_i f_i P_i is the mean over tokens of (f . s) / (1 . s), which keeps no normalised copy of the scores.
    """
    # f, FP32 [S, E]: how often each expert is among a token's K best, over what an even choice would give.
    scores_STE = scores_NE.unflatten(0, (sequences, -1))
    best_SC = scores_STE.detach().topk(shape.top_k, -1).indices.flatten(1)
    share_SE = scores_STE.new_zeros(sequences, shape.routed).scatter_add_(
        1, best_SC, torch.ones_like(best_SC, dtype=scores_STE.dtype)
    )
    share_SE *= shape.routed / best_SC.shape[1]
    weighted_ST = torch.bmm(scores_STE, share_SE.unsqueeze(-1)).squeeze(-1)
    return shape.balance_alpha * (weighted_ST / scores_STE.sum(-1)).mean()
