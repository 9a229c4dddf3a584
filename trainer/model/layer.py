"""Transformer layers: attention, then a dense FFN or a mixture of experts, each with a pre-norm and a residual.

A MoE layer is divided at its all-to-alls: `route` is the part before the dispatch, `experts` the part after it. The
shared experts are computed in `route` and added to the residual there, so that only rows for routed experts are
dispatched (DeepSeek-V3 overlaps exactly the two all-to-alls; section 3.2.1).

Legend: N = S * T tokens, S sequences, H hidden, K choices per token.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from dryvine.trainer.model.documents import Documents
from dryvine.trainer.model.experts import Experts
from dryvine.trainer.model.ffn import FFN
from dryvine.trainer.model.gate import Gate
from dryvine.trainer.model.mla import MLA
from dryvine.trainer.model.norm import Normed, residual_through_norm
from dryvine.trainer.model.spec import Spec


class Layer(nn.Module):
    """Common to both kinds of layers: attention, and the norm before the FFN or the experts."""

    def __init__(self, spec: Spec, ffn_feeds_linear: bool) -> None:
        super().__init__()
        hidden = spec.shape.hidden
        self.again = "norm" in spec.shape.recompute
        self.attention_norm, self.attention = spec.norm(hidden, feeds_linear=True), MLA(spec)
        self.ffn_norm = spec.norm(hidden, feeds_linear=ffn_feeds_linear)

    def attend(self, x_NH: Tensor, sequences: int, documents: Documents | None) -> Tensor:
        x_NH, latents = residual_through_norm(
            self.attention_norm, x_NH, lambda x_NH, normed: (x_NH, self.attention.down(normed)), self.again
        )
        return x_NH + self.attention.attend(*latents, sequences=sequences, documents=documents)


class DenseLayer(Layer):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec, ffn_feeds_linear=True)
        self.ffn = FFN(spec, spec.shape.ffn)

    def forward(self, x_NH: Tensor, sequences: int, documents: Documents | None = None) -> Tensor:
        x_NH = self.attend(x_NH, sequences, documents)
        return residual_through_norm(self.ffn_norm, x_NH, lambda x_NH, normed: x_NH + self.ffn(*normed), self.again)


class Routed(NamedTuple):
    """The result of `route`. `other`: for replayed choices, the counts that `Gate.replay` returns."""

    x: Tensor  # [N, H], the residual stream after attention and shared experts
    rows: Tensor  # [N, H], the experts' input
    weights: Tensor  # FP32 [N, K]
    experts: Tensor  # int64 [N, K]
    loss: Tensor | None  # balance loss
    other: Tensor | None = None


class MoELayer(Layer):
    def __init__(self, spec: Spec) -> None:
        s = spec.shape
        super().__init__(spec, ffn_feeds_linear=s.shared > 0)
        self.gate, self.experts = Gate(spec), Experts(spec)
        self.shared = FFN(spec, s.shared * s.expert_ffn) if s.shared else None

    def route(
        self,
        x_NH: Tensor,
        sequences: int,
        count: bool,
        documents: Documents | None = None,
        given_NK: Tensor | None = None,
    ) -> Routed:
        """Attention, shared experts, and the routing. `count`: add the choices to `gate.load`, unless they are `given`
        (replayed)."""
        x_NH = self.attend(x_NH, sequences, documents)

        def use(x_NH: Tensor, normed: Normed) -> tuple[Tensor, Tensor, Tensor]:
            shared_NH = x_NH if self.shared is None else x_NH + self.shared(*normed)
            return shared_NH, normed.x, self.gate(normed.x)

        shared_NH, rows_NH, logits_NE = residual_through_norm(self.ffn_norm, x_NH, use, self.again)
        if given_NK is None:
            return Routed(shared_NH, rows_NH, *self.gate.choose(logits_NE, sequences, count))
        choice, other = self.gate.replay(logits_NE, given_NK, sequences)
        return Routed(shared_NH, rows_NH, *choice, other)
