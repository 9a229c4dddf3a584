"""The common arguments of all modules of a rank: the model's shape, and this rank's dtype, device and FP8 arithmetic.

A module takes a Spec instead of six arguments, and the arithmetic of Linears is chosen in one place, `Spec.linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.linear import FP8Linear
from dryvine.trainer.model.embedding import Embedding
from dryvine.trainer.model.linear import Linear
from dryvine.trainer.model.norm import RMSNorm
from dryvine.trainer.model.rope import Rope
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.tensors.weight import Weight


@dataclass(frozen=True)
class Spec:
    """The rank holds `local_experts` routed experts from `first_expert` on; `shape.routed` must be a multiple of
    `ep_size`."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device | str
    ep_rank: int = 0
    ep_size: int = 1
    fp8: FP8 | None = None  # how Linears and FFNs multiply; None: in `dtype`

    @property
    def local_experts(self) -> int:
        return self.shape.routed // self.ep_size

    @property
    def first_expert(self) -> int:
        return self.ep_rank * self.local_experts

    @cached_property
    def rope(self) -> Rope:
        """One instance for all layers, which share its tables."""
        return Rope(self.shape)

    def weight(self, *size: int, expert: bool = False) -> Weight:
        weight = Weight(torch.empty(*size, dtype=self.dtype, device=self.device))
        weight.expert = expert
        return weight

    def linear(self, inputs: int, outputs: int, after_attention: bool = False) -> Linear | FP8Linear:
        """x Wᵀ in the recipe's arithmetic. `after_attention`: its input is saved in the recipe's format for that
        place."""
        if self.fp8 is None:
            return self.plain_linear(inputs, outputs)
        return FP8Linear(self.weight(outputs, inputs), self.fp8, after_attention)

    def plain_linear(self, inputs: int, outputs: int) -> Linear:
        """A Linear in the run's dtype, for any recipe: the head's."""
        return Linear(self.weight(outputs, inputs))

    def norm(self, size: int, feeds_linear: bool = False) -> RMSNorm:
        """A norm. `feeds_linear`: its output is read by Linears or an FFN of the recipe, which use the norm's cast."""
        return RMSNorm(self.weight(size), self.shape.norm_eps, self.fp8 if feeds_linear else None)

    def embedding(self, rows: int, size: int) -> Embedding:
        return Embedding(self.weight(rows, size))
