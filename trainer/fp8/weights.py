"""FP8 copies of weights, made once a step instead of once a microbatch."""

from __future__ import annotations

from typing import NamedTuple

from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.coarse import quantize_whole
from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.tensors.quantized import BothWays, Quantized, empty_transposed
from dryvine.trainer.tensors.weight import Weight


class KeptBlocks(NamedTuple):
    blocks: Quantized
    transposed: Quantized | None  # None: made when it is asked for


class WeightCache:
    """FP8 copies of each weight, made at first use, and again when the weights have changed; in the same memory, since
    CUDA graphs refer to it. Without `transposes`, half of them: what Dgrad reads is then transposed for each product,
    to the same bits.

    Whoever changes the weights must call `expire`: detecting changes of memory would cost a pass over it.
    """

    def __init__(self, recipe: Recipe, transposes: bool = True) -> None:
        self.recipe, self.transposes = recipe, transposes
        # Keyed by id, since tensors compare elementwise; keeping the weight ensures that its id is not reused.
        self._copies: dict[int, tuple[Weight, KeptBlocks]] = {}
        self._expired: set[int] = set()

    def fprop(self, weight: Weight) -> Quantized:
        """Blocks of a weight [O, I], or [X, O, I] by expert."""
        return self._get(weight).blocks

    def dgrad(self, weight: Weight) -> Quantized:
        """Blocks of its transpose."""
        copies = self._get(weight)
        return casts.transpose_blocks(copies.blocks) if copies.transposed is None else copies.transposed

    def _get(self, weight: Weight) -> KeptBlocks:
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
            self._get(weight)

    def _quantize(self, weight: Weight, out: KeptBlocks | None) -> KeptBlocks:
        quantize = casts.quantize_blocks if self.recipe.weight_tile == "128x128" else quantize_whole
        into = BothWays(out.blocks, out.transposed or empty_transposed(weight)) if out else None
        made = quantize(weight.detach(), self.recipe.scales, into)
        return KeptBlocks(made.fprop, made.dgrad if self.transposes else None)
