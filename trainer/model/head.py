"""The output head: final norm, logits, loss. Legend: N tokens, H hidden."""

from __future__ import annotations

from torch import Tensor

from dryvine.trainer.model.lesson import Scored
from dryvine.trainer.model.linear import Linear
from dryvine.trainer.model.loss import cross_entropy, target_logprobs
from dryvine.trainer.model.norm import Normed, RMSNorm, through_norm


class Head:
    """Not a Module: all depths of MTP share the projection, and each has a norm that lies elsewhere in the model.

    `again`: the normed x is recomputed in the backward; it must have no other reader.
    """

    def __init__(self, norm: RMSNorm, project: Linear, again: bool) -> None:
        self.norm, self.project, self.again = norm, project, again

    def __call__(self, x_NH: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> normed x [N, H], which the next depth reads, and the mean loss over the targets, FP32, each times its
        weight if there are weights."""

        def predict(normed: Normed) -> tuple[Tensor, Tensor]:
            return normed.x, cross_entropy(self.project(normed.x), targets_N, weights_N)

        return through_norm(self.norm, x_NH, predict, self.again)

    def score(self, x_NH: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Scored]:
        """-> normed x, as above, and what is known of each target."""

        def predict(normed: Normed) -> tuple[Tensor, Scored]:
            return normed.x, target_logprobs(self.project(normed.x), targets_N, temperature)

        return through_norm(self.norm, x_NH, predict, self.again)
