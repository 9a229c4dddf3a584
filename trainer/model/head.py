"""The output head: final norm, logits, loss. Legend: N tokens, H hidden."""

from __future__ import annotations

from torch import Tensor

from dryvine.trainer.model.layers import Linear, RMSNorm, through_norm
from dryvine.trainer.model.loss import cross_entropy


class Head:
    """Not a Module: all depths of MTP share the projection, and each has a norm that lies elsewhere in the model.

    `again`: the normed x is recomputed in the backward; it must have no other reader.
    """

    def __init__(self, norm: RMSNorm, project: Linear, again: bool) -> None:
        self.norm, self.project, self.again = norm, project, again

    def __call__(self, x_NH: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """-> normed x [N, H], which the next depth reads, and the mean loss over the targets, FP32."""

        def predict(normed_NH: Tensor) -> tuple[Tensor, Tensor]:
            return normed_NH, cross_entropy(self.project(normed_NH), targets_N)

        return through_norm(self.norm, x_NH, predict, self.again)
