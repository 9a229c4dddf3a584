"""What decoding keeps of the tokens that it has fed: their latents in every layer, and the experts that they chose.

MLA's cache (arXiv 2412.19437, section 2.1.1) is one row per token and layer, the normed key-value latent and the
rotated key that all heads share. A slot's rows lie one after the other, so that attention reads a slice and copies
nothing; slots in use are always the first ones, and a slot that ends is filled by the last. Pages, as servers have
them, would let lengths differ more freely at the price of a gather in every layer and step.

Legend: L layers of this rank, M of them mixtures, C slots, P positions, W = kv_lora + rope_dim, K choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Cache:
    """`latents` [L, C, P, W] in the run's dtype, `routes` int16 [M, C, P, K]. Grows as it is asked to, to a bound."""

    def __init__(self, layers: tuple[int, int], widths: tuple[int, int], like: Tensor) -> None:
        """(L, M), (W, K), and a tensor of the dtype and on the device."""
        self._layers, self._widths = layers, widths
        self.latents = like.new_empty(layers[0], 0, 0, widths[0])
        self.routes = torch.empty(layers[1], 0, 0, widths[1], dtype=torch.int16, device=like.device)

    def reserve(self, slots: int, positions: int, most: int) -> None:
        """Make room for so many slots of so many positions, and keep what is there of these. Room that it has beyond
        that, in either direction, is kept too as long as slots x positions are `most` together."""
        have = self.latents.shape[1:3]
        if slots <= have[0] and positions <= have[1]:
            return
        size = (max(slots, have[0]), max(positions, have[1]))
        if size[0] * size[1] > most:
            size = (slots, positions)
        self.latents, self.routes = _resized(self.latents, size), _resized(self.routes, size)

    def clear(self, slot: int) -> None:
        """Zero a slot. Numbers that are not finite would spoil the slot's next answer, which multiplies them by
        zero."""
        self.latents[:, slot] = 0

    def copy(self, sources: Sequence[int], targets: Sequence[int], positions: int) -> None:
        """Copy the first `positions` positions of slots `sources` to slots `targets`."""
        for part in (self.latents, self.routes):
            if part.shape[0]:
                part[:, list(targets), :positions] = part[:, list(sources), :positions]


def _resized(part: Tensor, size: tuple[int, int]) -> Tensor:
    # Zeros, since what is not seen yet is multiplied by zero, and must be finite.
    new = part.new_zeros(part.shape[0], *size, part.shape[-1])
    both = [slice(min(pair)) for pair in zip(part.shape[1:3], size, strict=True)]
    new[:, both[0], both[1]] = part[:, both[0], both[1]]
    return new
