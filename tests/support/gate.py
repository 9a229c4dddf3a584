"""Gates to test kernels on: shapes, logits whose order no rounding can change, and the definition in FP64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dryvine.trainer.model import gate
from dryvine.trainer.model.shape import Shape
from tests.support.model import tiny

V3 = {"routed": 256, "top_k": 8, "groups": 8, "group_limit": 4}
LITE = {"routed": 64, "top_k": 6, "groups": 1, "group_limit": 1, "score": "softmax", "normalise": False}
V2 = {"routed": 160, "top_k": 6, "groups": 8, "group_limit": 3, "score": "softmax", "normalise": False}
GATES: dict[str, dict[str, Any]] = {
    "V3": V3,
    "V3 without balance loss": V3 | {"balance_alpha": 0.0},
    "V2-Lite": LITE,
    "V2": V2,
    "V2 without balance loss": V2 | {"balance_alpha": 0.0},
    "softmax, normalised": LITE | {"normalise": True},
    "sigmoid, as they are": LITE | {"score": "sigmoid", "top_k": 8},
    "the same without balance loss": LITE | {"score": "sigmoid", "top_k": 8, "balance_alpha": 0.0},
    "nothing a power of two": {"routed": 6, "groups": 2, "group_limit": 1, "top_k": 3},
    "all groups, all experts": {"routed": 6, "groups": 3, "group_limit": 3, "top_k": 6},
    "one of one": {"routed": 1, "groups": 1, "group_limit": 1, "top_k": 1},
    "more than a program's tile": {"routed": 1100, "groups": 1, "group_limit": 1, "top_k": 2},
}


def gate_of(name: str) -> Shape:
    return tiny(**({"balance_alpha": 0.5} | GATES[name]))


def clear(shape: Shape, sequences: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [N, E] and a bias, such that scores, and sums of groups, that decide are 2e-6 apart: FP32 with an exp that
    is good to 1e-6 chooses as FP64 does."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.empty(shape.routed).uniform_(-0.1, 0.1, generator=generator)
    found = torch.empty(0, shape.routed)
    while len(found) < sequences * length:
        drawn = torch.randn(2 * sequences * length, shape.routed, generator=generator)
        found = torch.cat((found, drawn[margins(drawn, bias, shape) > 2e-6]))
    return found[: sequences * length], bias


def margins(logits_NE: Tensor, bias_E: Tensor, shape: Shape) -> Tensor:
    """How near the next comparison is that decides a choice: [N]."""
    wide = logits_NE.double()
    scores = wide.sigmoid() if shape.score == "sigmoid" else wide.softmax(-1)
    biased = scores + bias_E.double()
    best = min(shape.ranked_by, shape.routed // shape.groups)
    ranks = biased.unflatten(1, (shape.groups, -1)).topk(best, -1).values.sum(-1)
    in_best = biased.unflatten(1, (shape.groups, -1)).masked_fill(
        (ranks.unsqueeze(-1) < ranks.topk(shape.group_limit, -1).values[:, -1:, None]), -torch.inf
    )
    nearest = [torch.full((len(wide),), torch.inf, dtype=torch.float64)]
    for values, many in ((scores, shape.top_k), (in_best.flatten(1), shape.top_k), (ranks, shape.group_limit)):
        top = values.topk(min(many + 1, values.shape[1]), -1).values
        nearest += list((top[:, :-1] - top[:, 1:]).T)
    return torch.stack(nearest).amin(0)


def exact(
    logits_NE: Tensor, bias_E: Tensor, shape: Shape, sequences: int, dweights: Tensor, dloss: float
) -> tuple[list[Tensor], Tensor]:
    """The definition in FP64: [weights, d logits, loss (if any)], and the experts. `dweights` comes from above."""
    leaf = logits_NE.double().requires_grad_()
    weights, experts, loss = gate.route.reference(leaf, bias_E.double(), shape, sequences)
    total = (weights * dweights).sum() + (0.0 if loss is None else dloss * loss)
    (dlogits,) = torch.autograd.grad(total, leaf)
    return [weights.detach(), dlogits, *([] if loss is None else [loss.detach()])], experts


def case(shape: Shape, sequences: int, length: int) -> tuple[Tensor, Tensor, Tensor, float, list[Tensor], Tensor]:
    """Logits and bias as `clear` makes them, gradients of the weights and the loss, and what is `exact` of them."""
    logits, bias = clear(shape, sequences, length)
    dweights, dloss = torch.randn(sequences * length, shape.top_k, generator=torch.Generator().manual_seed(7)), 3.0
    return logits, bias, dweights, dloss, *exact(logits, bias, shape, sequences, dweights, dloss)


def near(found_NE: Tensor, truth_NE: Tensor, dweights_NK: Tensor, relative: float = 1e-6) -> None:
    """To `relative` of the greatest of its row, and an eighth (one rounding at 1e-6) of the gradients that cancel."""
    assert found_NE.dtype == torch.float32
    bound_N = relative * (truth_NE.abs().amax(1) + dweights_NK.abs().amax(1) / 8)
    assert ((found_NE - truth_NE).abs().amax(1) <= bound_N).all()


def tied(shape: Shape, tokens: int) -> tuple[Tensor, Tensor]:
    """Logits of four values [N, E], and the experts [N, K] by the rule that of equal experts, and of equal groups, the
    first is taken: stable sorts, since a CPU's topk has no rule. No two different pairs have equal sums."""
    logits = torch.randint(4, (tokens, shape.routed), generator=torch.Generator().manual_seed(8)).float()
    scores = logits.sigmoid() if shape.score == "sigmoid" else logits.softmax(-1)
    grouped = scores.unflatten(1, (shape.groups, -1))
    ranks = grouped.sort(-1, descending=True).values[..., : shape.ranked_by].sum(-1)
    barred = ranks.sort(dim=-1, descending=True, stable=True).indices[:, shape.group_limit :]
    grouped = grouped.scatter(1, barred.unsqueeze(-1).expand(-1, -1, grouped.shape[2]), -1.0)
    return logits, grouped.flatten(1).sort(dim=-1, descending=True, stable=True).indices[:, : shape.top_k]
