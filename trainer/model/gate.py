"""The gate: selects experts and their weights for each token, and computes the sequence-wise balance loss.

Load balance is maintained by a bias that is added to the scores for the selection only (arXiv 2412.19437, section
2.1.2) and updated after each step by the loads of the global batch; so no large auxiliary loss distorts the gradient,
and the small sequence-wise loss prevents extreme imbalance within a sequence.

In torch, forward and backward are 30 operators, 50 with the loss, which take longer to launch than to run; on a GPU
`route` is one kernel each way, with three more small launches for the loss (kernels/gate.py).

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
    """Computes FP32 logits, and selects experts by them."""

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
        """The result of `route`. `count`: add the choices to `load`."""
        return route(logits_NE, self.bias, self.shape, sequences, self.load if count else None)

    def replay(self, logits_NE: Tensor, given_NK: Tensor, sequences: int) -> tuple[Choice, Tensor]:
        """The result of `route` with recorded experts where `given` has any, and int64 [2]: the number of those tokens
        for which the gate would now choose another set, and the number of all of them. Does not change `load`."""
        scores_NE = score(logits_NE, self.shape)
        own_NK = choose_experts(scores_NE.detach(), self.bias, self.shape)
        given_N1 = given_NK[:, :1] >= 0
        other_N = (own_NK.sort(-1).values != given_NK.sort(-1).values).any(-1) & given_N1.squeeze(1)
        choice = weigh(scores_NE, torch.where(given_N1, given_NK, own_NK), sequences, self.shape)
        return choice, torch.stack((other_N.sum(), given_N1.sum()))


@torch.no_grad()
def move_bias(bias_E: Tensor, load_E: Tensor, gamma: float) -> None:
    """Decrease the bias by gamma where an expert's load over the global batch is above the mean, else increase it."""
    above = load_E.double() > load_E.double().mean()
    bias_E += torch.where(above, -gamma, gamma).to(bias_E)


@kernel_in("dryvine.trainer.model.kernels.gate")
def route(logits_NE: Tensor, bias_E: Tensor, shape: Shape, sequences: int, load_E: Tensor | None = None) -> Choice:
    """FP32 logits -> weights FP32 [N, K]; experts int64 [N, K] in descending order of score + bias within the best
    groups; and the balance loss (None if shape.balance_alpha is 0). Adds each expert's number of tokens to `load`,
    int64.

    Ties go to the first expert on a GPU; on a CPU, topk's order of ties is unspecified. NaN is the highest score.
    """
    scores_NE = score(logits_NE, shape)
    experts_NK = choose_experts(scores_NE.detach(), bias_E, shape)
    if load_E is not None:
        chosen = experts_NK.flatten()
        load_E.scatter_add_(0, chosen, torch.ones_like(chosen))
    return weigh(scores_NE, experts_NK, sequences, shape)


def score(logits_NE: Tensor, shape: Shape) -> Tensor:
    """The scores [N, E] of all experts (equation 15; softmax for V2)."""
    return logits_NE.sigmoid() if shape.score == "sigmoid" else logits_NE.softmax(-1)


def weigh(scores_NE: Tensor, experts_NK: Tensor, sequences: int, shape: Shape) -> Choice:
    """The result of `route` for given experts: their weights from their scores (equation 13), and the balance loss."""
    weights_NK = scores_NE.gather(1, experts_NK)
    if shape.normalise:
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
    weights_NK = weights_NK * shape.route_scale
    return weights_NK, experts_NK, balance_loss(scores_NE, sequences, shape) if shape.balance_alpha else None


def choose_experts(scores_NE: Tensor, bias_E: Tensor, shape: Shape) -> Tensor:
    """The K experts of each token: int64 [N, K]. Groups are ranked by the sum of their two best biased scores (sigmoid,
    V3) or by the best one (softmax, V2)."""
    return in_best_groups(scores_NE + bias_E, shape).topk(shape.top_k, -1).indices


def in_best_groups(biased_NE: Tensor, shape: Shape) -> Tensor:
    """The biased scores [N, E], with -inf outside the groups from which a token may choose."""
    if shape.groups == 1:
        return biased_NE
    ranks_NG = group_ranks(biased_NE, shape)
    best = ranks_NG.topk(shape.group_limit, -1).indices
    barred_NG = torch.ones_like(ranks_NG, dtype=torch.bool).scatter_(1, best, False)
    biased_NGe = biased_NE.unflatten(1, (shape.groups, -1))
    return biased_NGe.masked_fill(barred_NG.unsqueeze(-1), float("-inf")).flatten(1)


def group_ranks(biased_NE: Tensor, shape: Shape) -> Tensor:
    """The groups' scores [N, G], the highest of which are selected."""
    return biased_NE.unflatten(1, (shape.groups, -1)).topk(shape.ranked_by, -1).values.sum(-1)


def balance_loss(scores_NE: Tensor, sequences: int, shape: Shape) -> Tensor:
    """alpha * sum_i f_i P_i (equations 17-20), the mean over sequences; f counts each token's K best unbiased scores.

    sum_i f_i P_i is the mean over tokens of (f . s) / (1 . s), which keeps no normalised copy of the scores.
    """
    # f, FP32 [S, E]: how often each expert is among a token's K best, relative to a uniform choice.
    scores_STE = scores_NE.unflatten(0, (sequences, -1))
    best_SC = scores_STE.detach().topk(shape.top_k, -1).indices.flatten(1)
    share_SE = scores_STE.new_zeros(sequences, shape.routed).scatter_add_(
        1, best_SC, torch.ones_like(best_SC, dtype=scores_STE.dtype)
    )
    share_SE *= shape.routed / best_SC.shape[1]
    weighted_ST = torch.bmm(scores_STE, share_SE.unsqueeze(-1)).squeeze(-1)
    return shape.balance_alpha * (weighted_ST / scores_STE.sum(-1)).mean()
