"""A transformer layer, cut into the functions that its phases run.

The shared experts run inside the attention phase and join the residual there, so that dispatch carries nothing but the
rows for routed experts (DeepSeek-V3 overlaps exactly the two all-to-alls; section 3.2.1).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dryvine.parallel.stage import Flight, Outcome, State
from dryvine.trainer.model.layers import through_norm
from dryvine.trainer.model.mla import MLA
from dryvine.trainer.model.moe import FFN, Experts, Gate
from dryvine.trainer.model.spec import Spec


class Layer(nn.Module):
    """`name` is the block's, e.g. layers.3. `is_moe`: gate, shared and routed experts in place of one dense FFN."""

    def __init__(self, spec: Spec, name: str, is_moe: bool) -> None:
        super().__init__()
        s = spec.shape
        self.name, self.again = name, "norm" in s.recompute
        self.attention_norm, self.attention = spec.norm(s.hidden, feeds_linear=True), MLA(spec)
        self.ffn_norm = spec.norm(s.hidden, feeds_linear=not is_moe or s.shared > 0)
        if not is_moe:
            self.ffn = FFN(spec, s.ffn)
            return
        self.gate, self.experts = Gate(spec), Experts(spec)
        self.shared = FFN(spec, s.shared * s.expert_ffn) if s.shared else None

    def _attend(self, x_NH: Tensor, flight: Flight) -> Tensor:
        latents = through_norm(self.attention_norm, x_NH, self.attention.down, self.again)
        return x_NH + self.attention.attend(*latents, sequences=flight.tokens.shape[0])

    def dense(self, state: State, flight: Flight) -> Outcome:
        """(x,) -> (x,): attention and dense FFN."""
        x_NH = self._attend(state[0], flight)
        return Outcome((x_NH + through_norm(self.ffn_norm, x_NH, self.ffn, self.again),), {})

    def route(self, state: State, flight: Flight) -> Outcome:
        """(x,) -> (x, rows, weights, experts): attention, shared experts, and where each row is to go."""
        x_NH = self._attend(state[0], flight)

        def use(rows_NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            shared_NH = x_NH if self.shared is None else x_NH + self.shared(rows_NH)
            return shared_NH, rows_NH, self.gate(rows_NH)

        shared_NH, rows_NH, logits_NE = through_norm(self.ffn_norm, x_NH, use, self.again)
        weights_NK, experts_NK, loss = self.gate.choose(logits_NE, len(flight.tokens), count=flight.training)
        losses = {} if loss is None else {f"balance.{self.name}": loss}
        return Outcome((shared_NH, rows_NH, weights_NK, experts_NK), losses)

    def run_experts(self, state: State, flight: Flight) -> Outcome:
        """(rows [R, H], weights [R]) -> (rows,)."""
        return Outcome((self.experts(*state, flight.handles[self.name].counts),), {})

    def run_arrived(self, state: State, flight: Flight) -> tuple[State, Any]:
        """`run_experts` of rows that came in FP8, and what `Experts.arrived_backward` needs."""
        return self.experts.arrived(state, flight.handles[self.name].counts)
