"""How rows reach their experts while decoding: through the training run's own phases, or within this process.

A dispatcher works in every layout, but plans a routing for thousands of rows with a few dozen operators. A decoding
step on one CPU has a few rows, and sorting them here takes five.

Legend: N tokens, H hidden, K choices per token, R = N x K rows, X experts, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dryvine.parallel.stage import Flight, Phase, State
from dryvine.trainer.generate.layers import Multiply, ToExperts, times
from dryvine.trainer.model.experts import Experts
from dryvine.trainer.model.swiglu import swiglu_forward
from dryvine.trainer.tensors.weight import Weight

FEW = 256  # tokens x experts, up to which all of both are multiplied
FFNOfExpert = Callable[[int, Tensor, Tensor], Tensor]  # expert, its rows [R, H], their weights [R] -> [R, H]


def dispatched(phases: Sequence[Phase]) -> ToExperts:
    """Through the phases of a layer from routing to combine, with any dispatcher, codec and recipe. Collective over
    the expert-parallel group; a rank may have no tokens."""

    def run(rows_NH: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        # Only embeddings and heads read a flight's tokens.
        flight = Flight(experts_NK, 0.0, training=False)
        state: State = (torch.zeros_like(rows_NH), rows_NH, weights_NK, experts_NK)
        for phase in phases:
            state = phase.forward(state, flight).wait()
        return state[0]

    return run


def within(ffn: FFNOfExpert, experts: int) -> ToExperts:
    """All experts are in this process and multiply their rows one after the other."""

    def run(rows_NH: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        if not len(rows_NH):  # a lane without tokens, while other data ranks have some
            return rows_NH
        chosen_R = experts_NK.flatten()
        order_R = chosen_R.argsort(stable=True)
        counts: list[int] = torch.bincount(chosen_R, minlength=experts).tolist()
        parts_RH = rows_NH.index_select(0, order_R // experts_NK.shape[1]).split(counts)
        weights_R = weights_NK.flatten().index_select(0, order_R).split(counts)
        out_RH = torch.cat([ffn(x, parts_RH[x], weights_R[x]) for x, count in enumerate(counts) if count])
        pairs_NKH = torch.empty_like(out_RH).index_copy_(0, order_R, out_RH).unflatten(0, experts_NK.shape)
        return pairs_NKH.sum(1, dtype=torch.float32).to(rows_NH.dtype)

    return run


def all_at_once(experts: Experts) -> ToExperts:
    """Every expert multiplies every token, and products that were not chosen get weight 0. For few tokens this takes
    no longer than multiplying only the chosen rows, and needs no sorting, counting or call per expert."""
    gate_up_XHF, down_XFH = (weight.detach().transpose(1, 2) for weight in (experts.gate_up, experts.down))

    def run(rows_NH: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        gate_up_XNF = torch.bmm(rows_NH.expand(len(gate_up_XHF), -1, -1), gate_up_XHF)
        out_XNH = torch.bmm(swiglu_forward(gate_up_XNF, None), down_XFH)
        weights_NX = weights_NK.new_zeros(len(rows_NH), len(gate_up_XHF)).scatter_(1, experts_NK, weights_NK)
        sums_N1H = torch.bmm(weights_NX.unsqueeze(1), out_XNH.transpose(0, 1).float())
        return sums_N1H.squeeze(1).to(rows_NH.dtype)

    return run


def in_memory(experts: Experts) -> ToExperts:
    """All experts in this process's memory, on a CPU: for a few tokens of few experts at once, else one by one."""
    number = len(experts.gate_up)
    many = within(held(experts), number)
    if experts.gate_up.int8 is not None:
        return many
    few = all_at_once(experts)

    def run(rows_NH: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        return (few if len(rows_NH) * number <= FEW else many)(rows_NH, weights_NK, experts_NK)

    return run


def held(experts: Experts) -> FFNOfExpert:
    """The product of one expert held in memory, in FP32, BF16 or 8 bits."""
    gate_up, down = products(experts.gate_up), products(experts.down)

    def run(expert: int, rows_RH: Tensor, weights_R: Tensor) -> Tensor:
        return down[expert](swiglu_forward(gate_up[expert](rows_RH), weights_R))

    return run


def products(weight_XOI: Weight) -> list[Multiply]:
    """x Wᵀ of each expert."""
    if weight_XOI.int8 is not None:
        return [part.product for part in weight_XOI.int8.split(weight_XOI.shape[1])]
    return [times(weight_OI) for weight_OI in weight_XOI.detach()]
