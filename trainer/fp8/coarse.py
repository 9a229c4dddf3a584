"""Casts with fewer scales than the recipe has: one for a 128x128 block of activations, or one for a whole tensor.

They exist to test the claim that they train worse (arXiv 2412.19437, appendix B.2). In plain torch on any device, since
that test needs no speed.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from dryvine.trainer.fp8.casts import blocks_and_transposed, blocks_of, rows_of
from dryvine.trainer.fp8.numbers import tiles_of
from dryvine.trainer.tensors.quantized import BothWays, Quantized
from dryvine.trainer.tensors.tiles import TILE, ScaleFormat


def quantize_coarse(x: Tensor, tile: str, scales: ScaleFormat = "fp32") -> Quantized:
    """[R, C] -> `quantize_rows` of it with one scale for every 128x128 block (`tile` "128x128") or for the whole tensor
    ("tensor"). The scale is repeated for each 1x128 tile, so that every engine takes it."""
    tiles = tiles_of(x)
    amax = tiles.abs().amax(-1)
    if tile == "tensor":
        amax = amax.max().expand_as(amax)
    else:
        by_block = functional.pad(amax, (0, 0, 0, -len(amax) % TILE)).unflatten(0, (-1, TILE))
        amax = by_block.amax(1, keepdim=True).expand_as(by_block).flatten(0, 1)[: len(amax)]
    return rows_of(tiles, amax, x.shape[1], scales)


def quantize_whole(w: Tensor, scales: ScaleFormat = "fp32", out: BothWays | None = None) -> BothWays:
    """[..., R, C] -> `quantize_blocks` of it with one scale for each matrix."""
    tiles = blocks_of(w)
    amax = tiles.abs().amax((-3, -1)).amax((-2, -1), keepdim=True)
    return blocks_and_transposed(w, tiles, amax, scales, out)
