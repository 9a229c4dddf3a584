"""DeepSeekMoE (arXiv 2412.19437, section 2.1.2): the gate with its bias, and the routed experts of this rank.

The bias is moved after each step by the load of the global batch. No token is dropped: expert batches have whatever
size the choice gives them.

Legend: N = S * T tokens, S sequences, E routed experts, K choices per token, R rows on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dryvine.parallel.stage import Grads, State
from dryvine.trainer.fp8.linear import FFN as FFN8
from dryvine.trainer.fp8.linear import Kept
from dryvine.trainer.model.gate import Routed, route
from dryvine.trainer.model.layers import grouped_linear, linear_to_fp32
from dryvine.trainer.model.recompute import through
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.model.swiglu import swiglu
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized


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
        self.fp8, self.again = spec.fp8, "swiglu" in s.recompute

    def forward(self, rows_RH: Tensor, weights_R: Tensor, counts: Sequence[int]) -> Tensor:
        if self.fp8 is not None:
            return self.fp8.ffn(rows_RH, self.gate_up, self.down, counts, weights_R)
        groups = ExpertGroups.of(counts, rows_RH)
        gate_up = grouped_linear(rows_RH, self.gate_up, groups)
        return through(
            lambda: (swiglu(gate_up, weights_R),),
            lambda h: grouped_linear(h, self.down, groups),
            self.again,
        )

    def arrived(self, state: State, counts: Sequence[int]) -> tuple[State, tuple[FFN8, Kept]]:
        """`forward` of rows that came in FP8: (values [R, H], scales [R, H / 128], weights [R]) -> (rows [R, H],), and
        what its backward needs."""
        assert self.fp8 is not None
        values, scales, weights_R = state
        ffn = FFN8(self.gate_up, self.down, ExpertGroups.of(counts, values))
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
    """FP32 logits, and the choice by them. `bias` is state, not weight; `load` counts choices since a reset."""

    bias: Tensor
    load: Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.shape = spec.shape
        self.weight = spec.weight(spec.shape.routed, spec.shape.hidden)
        self.register_buffer("bias", torch.zeros(spec.shape.routed, device=spec.device))
        self.register_buffer("load", torch.zeros(spec.shape.routed, dtype=torch.int64, device=spec.device))

    def forward(self, x_NH: Tensor) -> Tensor:
        """-> logits, FP32 [N, E]."""
        return linear_to_fp32(x_NH, self.weight)

    def choose(self, logits_NE: Tensor, sequences: int, count: bool) -> Routed:
        """-> weights FP32 [N, K], experts int64 [N, K], and the balance loss, as `route` has them."""
        return route(logits_NE, self.bias, self.shape, sequences, self.load if count else None)


@torch.no_grad()
def move_bias(bias_E: Tensor, load_E: Tensor, gamma: float) -> None:
    """Down by gamma where an expert's load of the global batch is above the mean, else up by gamma."""
    above = load_E.double() > load_E.double().mean()
    bias_E += torch.where(above, -gamma, gamma).to(bias_E)
