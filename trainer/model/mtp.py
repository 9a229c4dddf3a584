"""Multi-token prediction (arXiv 2412.19437, section 2.2): a transformer layer for each token predicted beyond the next.

Equation 21 of the paper leaves two choices open, which follow from the released weights (transformers uses the same): a
depth takes the previous hidden states *after* their final norm (the main norm, then each depth's own), and `project`
reads the embedding half first. So released MTP weights load without changes.

Legend: N tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dryvine.trainer.model.layer import MoELayer
from dryvine.trainer.model.norm import Normed, through_normed
from dryvine.trainer.model.spec import Spec


class MTP(nn.Module):
    """One depth: `join`, then the layer, then a head with `norm`. Embedding and projection are the main model's."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        hidden = spec.shape.hidden
        self.norm_h, self.norm_e, self.norm = spec.norm(hidden), spec.norm(hidden), spec.norm(hidden)
        self.project = spec.linear(2 * hidden, hidden)
        self.layer = MoELayer(spec)
        self.fp8, self.again = spec.fp8, "norm" in spec.shape.recompute

    def join(self, x_NH: Tensor, embedded_NH: Tensor) -> Tensor:
        """Combine the normed hidden states of the previous depth and the next token's embedding -> [N, H] (equation
        21)."""

        def make() -> Normed:
            both_NH = torch.cat((self.norm_e(embedded_NH).x, self.norm_h(x_NH).x), -1)
            return Normed(both_NH, None if self.fp8 is None else self.fp8.rows(both_NH))

        return through_normed(make, lambda normed: self.project(*normed), self.again, make)
