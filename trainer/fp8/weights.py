"""FP8 copies of weights, made once a step instead of once a microbatch."""

from __future__ import annotations

from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.coarse import quantize_whole
from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.tensors.quantized import BothWays
from dryvine.trainer.tensors.weight import Weight


class WeightCache:
    """FP8 copies of each weight, made at first use and made again, in the same memory, once the weights have changed: a
    CUDA graph has the addresses.

    The optimizer's publish step must call `expire`: noticing by itself that memory changed would cost a pass over it.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        # By id, since tensors compare elementwise; holding the weight keeps its id its own.
        self._copies: dict[int, tuple[Weight, BothWays]] = {}
        self._expired: set[int] = set()

    def get(self, weight: Weight) -> BothWays:
        key = id(weight)
        if key not in self._copies:
            self._copies[key] = (weight, self._quantize(weight, None))
        elif key in self._expired:
            self._quantize(weight, self._copies[key][1])
        self._expired.discard(key)
        return self._copies[key][1]

    def expire(self) -> None:
        """The weights have changed."""
        self._expired.update(self._copies)

    def refresh(self) -> None:
        """Make again now what `get` would: before graphs, which call no `get`."""
        for weight, _ in [self._copies[key] for key in self._expired]:
            self.get(weight)

    def _quantize(self, weight: Weight, out: BothWays | None) -> BothWays:
        quantize = casts.quantize_blocks if self.recipe.weight_tile == "128x128" else quantize_whole
        return quantize(weight.detach(), self.recipe.scales, out)
