"""Quantised tensors as values: FP8 bytes and the multipliers that give them back, with the tile that they share.

A tile belongs to the tensor, not to the code: 1x128 (activations), 128x128 (weights) and the deliberately bad choices
that the tests show are one type, and a GEMM engine refuses a tile it cannot do. Layouts are those of Hopper's kernels:
values are K-major, scales of 1x128 tiles are stored token-major within a block of K, padded to 16 bytes.

Legend: R rows, C columns, X local experts, B blocks of 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.comm.integers import round_up
from dryvine.trainer.tensors.tiles import TILE, blocks

E4M3 = torch.float8_e4m3fn
_NUMBERS = torch.arange(256, dtype=torch.uint8).view(E4M3).float()  # the number that each byte is


def widen(values: Tensor) -> Tensor:
    """E4M3 as FP32. On a CPU by table, in a fifth of the time that torch's conversion takes."""
    if values.device.type != "cpu":
        return values.float()
    return _NUMBERS.index_select(0, values.contiguous().view(torch.uint8).flatten().int()).view(values.shape)


@dataclass(frozen=True)
class Quantized:
    """`values` E4M3 [..., R, C] (C contiguous), `scales` FP32 [..., R / rows, C / cols] rounded up; `tile` rows, cols.

    An element is its value times its tile's scale. A tile that held anything but finite numbers has scale infinity and
    values zero, which multiply to NaN: the fault stays loud in every product, and counting it costs no pass over data.
    """

    values: Tensor
    scales: Tensor
    tile: tuple[int, int] = (1, TILE)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        rows, cols = self.values.shape[-2:]
        scales = self.scales.repeat_interleave(self.tile[1], -1)[..., :cols]
        if self.tile[0] > 1:
            scales = scales.repeat_interleave(self.tile[0], -2)[..., :rows, :]
        return widen(self.values).mul_(scales).to(dtype)

    def to(self, device: torch.device | str) -> Quantized:
        """A copy on another device, scales in the layout they had."""
        scales = torch.empty_strided(self.scales.shape, self.scales.stride(), device=device)
        return Quantized(self.values.to(device), scales.copy_(self.scales), self.tile)

    @property
    def is_cuda(self) -> bool:
        return self.values.is_cuda


@dataclass(frozen=True)
class E5M6:
    """12-bit floats of 1x128 tiles, for the one activation that E4M3 is too coarse for (arXiv 2412.19437, 3.3.3).

    `high` uint8 [R, C]: sign, exponent and two bits of mantissa (an E5M2 number, were it read alone).
    `low` uint8 [R, C / 2]: the last four bits of columns c (low nibble) and c + 64 (high nibble) of a tile.
    `scales` FP32 [R, C / 128], powers of two.
    """

    high: Tensor
    low: Tensor
    scales: Tensor

    @property
    def is_cuda(self) -> bool:
        return self.high.is_cuda


def empty_rows(rows: int, cols: int, device: torch.device) -> Quantized:
    """Room for 1x128 tiles."""
    return Quantized(torch.empty(rows, cols, dtype=E4M3, device=device), empty_scales(rows, cols, device))


def empty_scales(rows: int, cols: int, device: torch.device) -> Tensor:
    """Room for those of 1x128 tiles: [R, B] with strides (1, rows padded to 4), as scaled_mm and TMA want them."""
    wide = round_up(rows, 4)
    made = torch.empty_strided((wide, blocks(cols)), (1, wide), device=device)
    return made if rows == wide else made[:rows]


def empty_blocks(shape: Sequence[int], device: torch.device) -> Quantized:
    """Room for 128x128 tiles of [..., R, C]. Rows of scales are padded to 4, as scaled_mm wants them."""
    *batch, rows, cols = shape
    scales = torch.empty(*batch, blocks(rows), round_up(blocks(cols), 4), device=device)[..., : blocks(cols)]
    return Quantized(torch.empty(*shape, dtype=E4M3, device=device), scales, (TILE, TILE))


class BothWays(NamedTuple):
    """FP8 blocks of a weight [O, I], or [X, O, I] by expert, and of its transpose: operands of Fprop and of Dgrad."""

    fprop: Quantized
    dgrad: Quantized


def empty_both_ways(w: Tensor) -> BothWays:
    """For the weight w; not filled."""
    return BothWays(empty_blocks(w.shape, w.device), empty_transposed(w))


def empty_transposed(w: Tensor) -> Quantized:
    """Room for the blocks of the transpose of w."""
    *batch, rows, cols = w.shape
    return empty_blocks((*batch, cols, rows), w.device)
