"""The routed experts of this rank (DeepSeekMoE, arXiv 2412.19437, section 2.1.2), applied to dispatched rows.

No token is dropped: an expert's batch has whatever size results from the routing of all ranks.

Legend: R rows on this rank, grouped by expert; X local experts, H hidden, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dryvine.trainer.fp8.ffn import FP8FFN, SavedFFN
from dryvine.trainer.model.grouped import grouped_linear
from dryvine.trainer.model.recompute import through
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.model.swiglu import swiglu
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized

Saved = tuple[FP8FFN, SavedFFN]  # by `Experts.arrived`, for its backward


class Experts(nn.Module):
    """SwiGLU FFNs with stacked weights: gate_up [X, 2F, H], down [X, H, F]."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        s, local = spec.shape, spec.local_experts
        self.gate_up = spec.weight(local, 2 * s.expert_ffn, s.hidden, expert=True)
        self.down = spec.weight(local, s.hidden, s.expert_ffn, expert=True)
        self.fp8, self.again = spec.fp8, "swiglu" in s.recompute

    def forward(self, rows_RH: Tensor, weights_R: Tensor, counts: Sequence[int]) -> Tensor:
        """`counts` rows of each local expert, each row's output times its weight: [R, H] -> [R, H]."""
        groups = ExpertGroups.of(counts, rows_RH)
        if self.fp8 is not None:
            return FP8FFN(self.fp8, self.gate_up, self.down, groups)(rows_RH, weights_R)
        gate_up = grouped_linear(rows_RH, self.gate_up, groups)
        return through(
            lambda: (swiglu(gate_up, weights_R),), lambda h: grouped_linear(h, self.down, groups), self.again
        )

    def arrived(self, rows: Quantized, weights_R: Tensor, counts: Sequence[int]) -> tuple[Tensor, Saved]:
        """`forward` of rows that were dispatched in FP8 -> rows [R, H] in the run's dtype, and what `arrived_backward`
        needs."""
        assert self.fp8 is not None
        ffn = FP8FFN(self.fp8, self.gate_up, self.down, ExpertGroups.of(counts, rows.values))
        rows_RH, kept = ffn.forward(rows, weights_R, self.down.dtype)
        return rows_RH, (ffn, kept)

    def arrived_backward(self, saved: Saved, dy: Quantized) -> tuple[Tensor, Tensor | None]:
        """The gradient of the output rows, dispatched in FP8 too -> drows [R, H], dweights [R]."""
        ffn, kept = saved
        return ffn.backward(kept, dy, lambda: ffn.fp8.columns(dy, ffn.groups), self.down.dtype)
