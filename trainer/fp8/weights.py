"""FP8 copies of weights, made once a step instead of once a microbatch."""

from __future__ import annotations

from typing import NamedTuple

from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.coarse import quantize_whole
from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.weight import Weight


class BothWays(NamedTuple):
    """FP8 blocks of a weight [O, I], or [X, O, I] by expert, and of its transpose: operands of Fprop and of Dgrad."""

    fprop: Quantized
    dgrad: Quantized


class WeightCache:
    """FP8 copies of each weight, made at first use and kept until the weights change.

    The optimizer's publish step must call `clear`: noticing by itself that memory changed would cost a pass over it.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        # By id, since tensors compare elementwise; holding the weight keeps its id its own.
        self._copies: dict[int, tuple[Weight, BothWays]] = {}

    def get(self, weight: Weight) -> BothWays:
        if id(weight) not in self._copies:
            quantize = casts.quantize_blocks if self.recipe.weight_tile == "128x128" else quantize_whole
            copies = BothWays(*quantize(weight.detach(), self.recipe.scales))
            self._copies[id(weight)] = (weight, copies)
        return self._copies[id(weight)][1]

    def clear(self) -> None:
        self._copies.clear()
