"""Quantised tensors as values: FP8 bytes and the multipliers that give them back, with the tile that they share.

A tile belongs to the tensor, not to the code: 1x128 (activations), 128x128 (weights) and the deliberately bad choices
that the tests show are one type, and a GEMM engine refuses a tile it cannot do. Layouts are those of Hopper's kernels:
values are K-major, scales of 1x128 tiles are stored token-major within a block of K, padded to 16 bytes.

Legend: R rows, C columns, X local experts, B blocks of 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from dryvine.comm.dispatch.routing import upload

TILE = 128
E4M3_MAX = 448.0
E5M6_MAX = 65024.0  # (2 - 2^-6) * 2^15: FP16's range with six bits of mantissa
AMAX_FLOOR = 1e-4
FP8 = torch.float8_e4m3fn
E4M3 = torch.arange(256, dtype=torch.uint8).view(FP8).float()  # the number of each byte
ScaleFormat = Literal["fp32", "ue8m0"]


def blocks(size: int) -> int:
    return -(-size // TILE)


def pad(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def widen(values: Tensor) -> Tensor:
    """E4M3 as FP32. On a CPU by table, in a fifth of the time that torch's conversion takes."""
    if values.device.type != "cpu":
        return values.float()
    return E4M3.index_select(0, values.contiguous().view(torch.uint8).flatten().int()).view(values.shape)


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
    def nbytes(self) -> int:
        """Bytes held: what a saved activation costs."""
        return self.values.nbytes + self.scales.untyped_storage().nbytes()


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
    def nbytes(self) -> int:
        return self.high.nbytes + self.low.nbytes + self.scales.untyped_storage().nbytes()


@dataclass(frozen=True)
class Groups:
    """Rows of local experts, one after the other: `counts` on the host, `ends` and tables for kernels on `device`.

    FP8's Wgrad contracts over an expert's rows, so its operands give every expert a whole number of 128-row blocks, the
    last one filled with zeros: tiles never straddle experts and no kernel needs a remainder. What goes to the device
    goes once, on first use, and the host does not wait for it.
    """

    counts: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(counts: Sequence[int], like: Tensor) -> Groups:
        return Groups(tuple(counts), like.device)

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @property
    def blocks(self) -> int:
        return sum(blocks(count) for count in self.counts)

    @cached_property
    def block_starts(self) -> tuple[int, ...]:
        """First padded block of each expert, and the end: X + 1 numbers."""
        return (0, *accumulate(blocks(count) for count in self.counts))

    @cached_property
    def ends(self) -> Tensor:
        """int32 [X]: where each expert's rows end, unpadded."""
        return upload(list(accumulate(self.counts)), self.device, torch.int32)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """int32 [B, 3]: (expert, first row, end of the expert's rows) of each block; int32 [X + 1]: `block_starts`.
        One copy to the device for both."""
        ends = list(accumulate(self.counts))
        flat = [
            entry
            for expert, (count, end) in enumerate(zip(self.counts, ends, strict=True))
            for first in range(end - count, end, TILE)
            for entry in (expert, first, end)
        ]
        both = upload([*flat, *self.block_starts], self.device, torch.int32)
        return both[: len(flat)].view(-1, 3), both[len(flat) :]


def empty_rows(rows: int, cols: int, device: torch.device) -> Quantized:
    """Room for 1x128 tiles."""
    return Quantized(torch.empty(rows, cols, dtype=FP8, device=device), empty_scales(rows, cols, device))


def empty_scales(rows: int, cols: int, device: torch.device) -> Tensor:
    """Room for those of 1x128 tiles: [R, B] with strides (1, rows padded to 4), as scaled_mm and TMA want them."""
    wide = pad(rows, 4)
    made = torch.empty_strided((wide, blocks(cols)), (1, wide), device=device)
    return made if rows == wide else made[:rows]


def empty_blocks(shape: Sequence[int], device: torch.device) -> Quantized:
    """Room for 128x128 tiles of [..., R, C]. Rows of scales are padded to 4, as scaled_mm wants them."""
    *batch, rows, cols = shape
    scales = torch.empty(*batch, blocks(rows), pad(blocks(cols), 4), device=device)[..., : blocks(cols)]
    return Quantized(torch.empty(*shape, dtype=FP8, device=device), scales, (TILE, TILE))
