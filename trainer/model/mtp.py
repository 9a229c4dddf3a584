"""The ends of the model: the head that predicts, and the multi-token-prediction modules that predict further.

Released weights fix what the paper (equation 21) leaves open, and transformers runs them so: a depth takes the previous
hidden states *after* their final norm (the main norm, then each depth's own), and `project` reads the embedding half
first. Both are kept here, so that released MTP weights load as they are.

Legend: N = S * T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dryvine.parallel.stage import Flight, Outcome, State
from dryvine.trainer.model.layers import Embedding, Linear
from dryvine.trainer.model.loss import cross_entropy
from dryvine.trainer.model.recompute import through
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.model.spec import Spec


def tokens_at(flight: Flight, shape: Shape, shift: int) -> Tensor:
    """The flight's tokens `shift` places on, T of each sequence, flat: int64 [N]."""
    length = flight.tokens.shape[1] - 1 - shape.mtp_depth
    return flight.tokens[:, shift : shift + length].flatten()


class Head:
    """A phase function: final norm, logits, loss of the token `shift` places on. It owns no weights, since the head's
    weight is shared by all depths; it gives the normed hidden states on to the next depth if there is one."""

    def __init__(self, norm: nn.Module, project: Linear, shape: Shape, depth: int) -> None:
        self.norm, self.project, self.shape, self.depth = norm, project, shape, depth
        self.loss = "loss" if depth == 0 else f"mtp.{depth - 1}"
        self.weight = 1.0 if depth == 0 else shape.mtp_weight / shape.mtp_depth

    def __call__(self, state: State, flight: Flight) -> Outcome:
        (x_NH,) = state
        targets_N = tokens_at(flight, self.shape, self.depth + 1)

        def predict(normed_NH: Tensor) -> tuple[Tensor, Tensor]:
            return normed_NH, cross_entropy(self.project(normed_NH), targets_N)

        last = self.depth == self.shape.mtp_depth
        normed_NH, loss = through(lambda: (self.norm(x_NH),), predict, again=last and "norm" in self.shape.recompute)
        return Outcome(() if last else (normed_NH,), {self.loss: loss * self.weight})


class MTP(nn.Module):
    """What one depth has besides its transformer layer: [N, H] of the depth before, and the next token -> [N, H]."""

    def __init__(self, spec: Spec, layer: nn.Module) -> None:
        super().__init__()
        hidden = spec.shape.hidden
        self.norm_h, self.norm_e, self.norm = spec.norm(hidden), spec.norm(hidden), spec.norm(hidden)
        self.project = spec.linear(2 * hidden, hidden)
        self.layer = layer
        self.again = "norm" in spec.shape.recompute

    def join(self, x_NH: Tensor, next_N: Tensor, embed: Embedding) -> Tensor:
        embedded_NH = embed(next_N)
        return through(
            lambda: (torch.cat((self.norm_e(embedded_NH), self.norm_h(x_NH)), -1),), self.project, self.again
        )
