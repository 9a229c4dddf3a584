"""The output head: final norm, logits, loss. Legend: N tokens, H hidden."""

from __future__ import annotations

from torch import Tensor

from dryvine.trainer.model.lesson import Scored
from dryvine.trainer.model.linear import Linear
from dryvine.trainer.model.loss import cross_entropy, target_logprobs
from dryvine.trainer.model.norm import Normed, RMSNorm, through_norm


class Head:
    """Not a Module: all MTP depths share the projection, and each has its own norm elsewhere in the model.

    `again`: the normed x is recomputed in the backward; then nothing else may read it.
    """

    def __init__(self, norm: RMSNorm, project: Linear, again: bool) -> None:
        self.norm, self.project, self.again = norm, project, again

    def __call__(self, x_NH: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> normed x [N, H], which the next MTP depth reads, and the FP32 mean over the targets of the loss, times the
        targets' weights if given."""

        def predict(normed: Normed) -> tuple[Tensor, Tensor]:
            return normed.x, cross_entropy(self.project(normed.x), targets_N, weights_N)

        return through_norm(self.norm, x_NH, predict, self.again)

    def score(self, x_NH: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Scored]:
        """-> normed x, as above, and log-probabilities and entropies of the targets."""

        def predict(normed: Normed) -> tuple[Tensor, Scored]:
            return normed.x, target_logprobs(self.project(normed.x), targets_N, temperature)

        return through_norm(self.norm, x_NH, predict, self.again)
