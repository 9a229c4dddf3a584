"""DeepSeekMoE (arXiv 2412.19437, section 2.1.2): the gate, its balance, and the routed experts of this rank.

Balance is kept by a bias that only choosing sees, moved after each step by the load of the global batch, so no large
auxiliary loss bends the gradient; the small sequence-wise loss guards against a single skewed sequence. No token is
dropped: expert batches have whatever size the choice gives them.

Legend: N = S * T tokens, S sequences, E routed experts, G groups, K choices per token, R rows on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dryvine.parallel.stage import Grads, State
from dryvine.trainer.fp8.linear import FFN as FFN8
from dryvine.trainer.fp8.linear import Kept
from dryvine.trainer.fp8.tensors import Groups, Quantized
from dryvine.trainer.model.layers import grouped_linear, linear_to_fp32
from dryvine.trainer.model.recompute import through
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.model.swiglu import swiglu


class FFN(nn.Module):
    """A dense SwiGLU FFN: [N, H] -> [N, H]. `gate_up` stacks both projections, the gate's first."""

    def __init__(self, spec: Spec, width: int) -> None:
        super().__init__()
        self.gate_up = spec.linear(spec.shape.hidden, 2 * width)
        self.down = spec.linear(width, spec.shape.hidden)
        self.fp8, self.again = spec.fp8, "swiglu" in spec.shape.recompute

    def forward(self, x_NH: Tensor) -> Tensor:
        if self.fp8 is not None:
            return self.fp8.ffn(x_NH, self.gate_up.weight, self.down.weight)
        gate_up = self.gate_up(x_NH)
        return through(lambda: (swiglu(gate_up),), self.down, self.again)


class Experts(nn.Module):
    """This rank's routed experts, stacked: gate_up [X, 2F, H], down [X, H, F]."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        s, local = spec.shape, spec.local_experts
        self.gate_up = spec.weight(local, 2 * s.expert_ffn, s.hidden, expert=True)
        self.down = spec.weight(local, s.hidden, s.expert_ffn, expert=True)
        self.wgrad, self.fp8, self.again = spec.wgrad, spec.fp8, "swiglu" in s.recompute

    def forward(self, rows_RH: Tensor, weights_R: Tensor, counts: Sequence[int]) -> Tensor:
        if self.fp8 is not None:
            return self.fp8.ffn(rows_RH, self.gate_up, self.down, counts, weights_R)
        groups = Groups.of(counts, rows_RH)
        gate_up = grouped_linear(rows_RH, self.gate_up, self.wgrad, groups)
        return through(
            lambda: (swiglu(gate_up, weights_R),),
            lambda h: grouped_linear(h, self.down, self.wgrad, groups),
            self.again,
        )

    def arrived(self, state: State, counts: Sequence[int]) -> tuple[State, tuple[FFN8, Kept]]:
        """`forward` of rows that came in FP8: (values [R, H], scales [R, H / 128], weights [R]) -> (rows [R, H],), and
        what its backward needs."""
        assert self.fp8 is not None
        values, scales, weights_R = state
        ffn = FFN8(self.gate_up, self.down, Groups.of(counts, values))
        rows_RH, kept = self.fp8.ffn_forward(ffn, Quantized(values, scales), weights_R, self.down.dtype)
        return (rows_RH,), (ffn, kept)

    def arrived_backward(self, saved: tuple[FFN8, Kept], grads: Grads) -> Grads:
        """The rows' gradient, in FP8 too, (values, scales) -> (drows [R, H], dweights [R])."""
        fp8, (ffn, kept) = self.fp8, saved
        assert fp8 is not None
        values, scales = cast(State, grads)
        dy = Quantized(values, scales)
        return fp8.ffn_backward(ffn, kept, dy, lambda: fp8.columns(dy, ffn.groups), self.down.dtype)


class Gate(nn.Module):
    """Scores every expert in FP32 and chooses. `bias` is state, not weight; `load` counts choices since a reset."""

    bias: Tensor
    load: Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.shape, self.wgrad = spec.shape, spec.wgrad
        self.weight = spec.weight(spec.shape.routed, spec.shape.hidden)
        self.register_buffer("bias", torch.zeros(spec.shape.routed, device=spec.device))
        self.register_buffer("load", torch.zeros(spec.shape.routed, dtype=torch.int64, device=spec.device))

    def forward(self, x_NH: Tensor) -> Tensor:
        """-> scores, FP32 [N, E]."""
        logits = linear_to_fp32(x_NH, self.weight, self.wgrad)
        return logits.sigmoid() if self.shape.score == "sigmoid" else logits.softmax(-1)

    def choose(self, scores_NE: Tensor, count: bool) -> tuple[Tensor, Tensor]:
        """-> weights FP32 [N, K], experts int64 [N, K], by score + bias within the best groups."""
        experts_NK = choose(scores_NE.detach(), self.bias, self.shape)
        if count:
            self.load += torch.bincount(experts_NK.flatten(), minlength=self.shape.routed)
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.shape.normalise:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return weights_NK * self.shape.route_scale, experts_NK


def choose(scores_NE: Tensor, bias_E: Tensor, shape: Shape) -> Tensor:
    """The K experts of each token: int64 [N, K]. A group's rank is the sum of its two best biased scores (sigmoid, V3)
    or its best one (softmax, V2)."""
    biased_NE = scores_NE + bias_E
    if shape.groups > 1:
        biased_NGe = biased_NE.unflatten(1, (shape.groups, -1))
        best = 2 if shape.score == "sigmoid" else 1
        kept = biased_NGe.topk(best, -1).values.sum(-1).topk(shape.group_limit, -1).indices
        barred = torch.ones(biased_NGe.shape[:2], dtype=torch.bool, device=kept.device).scatter_(1, kept, False)
        biased_NE = biased_NGe.masked_fill(barred.unsqueeze(-1), float("-inf")).flatten(1)
    return biased_NE.topk(shape.top_k, -1).indices


def balance_loss(scores_NE: Tensor, sequences: int, shape: Shape) -> Tensor:
    """alpha * sum_i f_i P_i (equations 17-20), the mean over the sequences; f counts each token's K best plain scores.

    sum_i f_i P_i is the mean over tokens of (f . s) / (1 . s), which keeps no normalised copy of the scores.
    """
    scores_STE = scores_NE.unflatten(0, (sequences, -1))
    best_SC = scores_STE.detach().topk(shape.top_k, -1).indices.flatten(1)
    share_SE = scores_STE.new_zeros(sequences, shape.routed).scatter_add_(
        1, best_SC, torch.ones_like(best_SC, dtype=torch.float32)
    )
    share_SE *= shape.routed / best_SC.shape[1]
    weighted_ST = torch.bmm(scores_STE, share_SE.unsqueeze(-1)).squeeze(-1)
    return shape.balance_alpha * (weighted_ST / scores_STE.sum(-1)).mean()


@torch.no_grad()
def move_bias(bias_E: Tensor, load_E: Tensor, gamma: float) -> None:
    """Down by gamma where an expert's load of the global batch is above the mean, else up by gamma."""
    above = load_E.double() > load_E.double().mean()
    bias_E += torch.where(above, -gamma, gamma).to(bias_E)
