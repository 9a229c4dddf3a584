"""FP8 copies of weights, made once a step instead of once a microbatch."""

from __future__ import annotations

from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.coarse import quantize_whole
from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.tensors.quantized import BothWays
from dryvine.trainer.tensors.weight import Weight


class WeightCache:
    """FP8 copies of each weight, made at first use, and again when the weights have changed; in the same memory, since
    CUDA graphs refer to it.

    Whoever changes the weights must call `expire`: detecting changes of memory would cost a pass over it.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        # Keyed by id, since tensors compare elementwise; keeping the weight ensures that its id is not reused.
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
        """Invalidate all copies, since the weights have changed."""
        self._expired.update(self._copies)

    def refresh(self) -> None:
        """Update all copies now, for CUDA graphs, which do not call `get`."""
        for weight, _ in [self._copies[key] for key in self._expired]:
            self.get(weight)

    def _quantize(self, weight: Weight, out: BothWays | None) -> BothWays:
        quantize = casts.quantize_blocks if self.recipe.weight_tile == "128x128" else quantize_whole
        return quantize(weight.detach(), self.recipe.scales, out)
