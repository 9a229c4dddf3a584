"""How experts are used on given texts: tokens per expert, and how similar the experts' outputs are.

Legend: N tokens, X experts of a layer, H hidden, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.trainer.generate.experts import held, in_memory
from dryvine.trainer.generate.layers import ToExperts
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.generate.score import Passage
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.experts import Experts
from dryvine.trainer.model.layer import MoELayer

ROWS = 256  # tokens of a layer on which the outputs of experts are compared


@dataclass
class ExpertUse:
    """The use of a layer's experts. `load` int64 [X]: tokens routed to each."""

    experts: Experts
    load: Tensor
    rows: list[Tensor] = field(default_factory=list)  # [n, H], ROWS together

    def watched(self) -> ToExperts:
        """The layer's experts, with every choice counted."""
        onward = in_memory(self.experts)

        def run(rows_NH: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
            self.load += torch.bincount(experts_NK.flatten(), minlength=len(self.load))
            room = ROWS - sum(map(len, self.rows))
            self.rows.append(rows_NH[:room].clone())
            return onward(rows_NH, weights_NK, experts_NK)

        return run

    @torch.no_grad()
    def similarity(self) -> Tensor:
        """[X, X]: cosine similarity of the experts' outputs on the same tokens."""
        ffn, rows_NH = held(self.experts), torch.cat(self.rows)
        ones_N = torch.ones(len(rows_NH), dtype=rows_NH.dtype)
        outputs = torch.stack([ffn(x, rows_NH, ones_N).float().flatten() for x in range(len(self.load))])
        unit = functional.normalize(outputs, dim=1)
        return unit @ unit.t()


def measure(model: Model, passages: Sequence[Passage]) -> dict[str, ExpertUse]:
    """The use of the experts of every layer on these passages."""
    uses = {
        name: ExpertUse(layer.experts, torch.zeros(model.spec.shape.routed, dtype=torch.int64))
        for name in model.gates
        if isinstance(layer := model.root.get_submodule(name), MoELayer)
    }
    sampler = Sampler.alone(model, experts={name: use.watched() for name, use in uses.items()})
    for _ in sampler.score(passages):
        pass
    return uses
