"""Casts to FP8 and back: activations by rows, by columns or both at once, weights by blocks, and E5M6.

This is the CPU implementation and the reference for the kernels (kernels/casts.py), which must agree bitwise;
numbers.py explains why, and defines the scales.

Legend: R rows, C columns, B blocks of 128, P rows padded by expert to 128.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.comm.by_device import kernel_in
from dryvine.trainer.fp8.numbers import filled, scale_of, scaled, tiles_of
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import (
    E4M3,
    E5M6,
    BothWays,
    Quantized,
    empty_both_ways,
    empty_rows,
    empty_scales,
    empty_transposed,
)
from dryvine.trainer.tensors.tiles import E5M6_MAX, TILE, ScaleFormat

KERNELS = "dryvine.trainer.fp8.kernels.casts"


@kernel_in(KERNELS)
def quantize_rows(x: Tensor, scales: ScaleFormat = "fp32") -> Quantized:
    """[R, C] -> values [R, C] in 1x128 tiles."""
    tiles = tiles_of(x)
    return rows_of(tiles, tiles.abs().amax(-1), x.shape[1], scales)


def rows_of(tiles: Tensor, amax: Tensor, cols: int, scales: ScaleFormat) -> Quantized:
    """Cast FP32 [R, B, 128], as `tiles_of` returns it for `cols` columns, with scales from `amax` [R, B]."""
    out = empty_rows(len(tiles), cols, tiles.device)
    out.scales.copy_(scale_of(amax, scales))
    out.values.copy_(scaled(tiles, out.scales.unsqueeze(-1)).flatten(1)[:, :cols].to(E4M3))
    return out


def padded(x: Tensor, groups: ExpertGroups) -> Tensor:
    """The rows of every expert padded to whole blocks: [R, C] -> [P, C]."""
    return torch.cat([filled(part, rows=-len(part) % TILE) for part in x.split(list(groups.counts))])


@kernel_in(KERNELS)
def quantize_columns(x: Tensor | Quantized, groups: ExpertGroups, scales: ScaleFormat = "fp32") -> Quantized:
    """[R, C] -> transposed, values [C, P] in 1x128 tiles over rows (128x1 tiles of x): an operand of Wgrad.

    An FP8 source is dequantised, transposed and quantised again, since its tiles run along the other dimension.
    """
    rows_PC = padded(x.dequantize() if isinstance(x, Quantized) else x.float(), groups)
    tiles = rows_PC.unflatten(0, (-1, TILE))  # [B, 128, C]
    scale = scale_of(tiles.abs().amax(1), scales)
    values = scaled(tiles, scale.unsqueeze(1)).to(E4M3).flatten(0, 1)
    out = empty_rows(rows_PC.shape[1], len(rows_PC), rows_PC.device)
    out.scales.copy_(scale.t())
    # Transposed as bytes: a quarter of the traffic of FP32.
    out.values.view(torch.uint8).copy_(values.view(torch.uint8).t())
    return out


@kernel_in(KERNELS)
def quantize_both(x: Tensor, groups: ExpertGroups, scales: ScaleFormat = "fp32") -> tuple[Quantized, Quantized]:
    """`quantize_rows` and `quantize_columns` of one tensor, which the kernel reads once: both uses of a gradient."""
    return quantize_rows(x, scales), quantize_columns(x, groups, scales)


@kernel_in(KERNELS)
def quantize_blocks(w: Tensor, scales: ScaleFormat = "fp32", out: BothWays | None = None) -> BothWays:
    """[..., R, C] -> 128x128 blocks of w, and of its transpose [..., C, R]: the same bytes and scales, transposed. Into
    `out`, an earlier result for the same shape, if there is one."""
    tiles = blocks_of(w)
    return blocks_and_transposed(w, tiles, tiles.abs().amax((-3, -1)), scales, out)


def blocks_of(w: Tensor) -> Tensor:
    """[..., R, C] -> FP32 [..., R / 128, 128, C / 128, 128], padded with zeros."""
    rows, cols = w.shape[-2:]
    full = functional.pad(w.float(), (0, -cols % TILE, 0, -rows % TILE))
    return full.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))


def blocks_and_transposed(
    w: Tensor, tiles: Tensor, amax: Tensor, scales: ScaleFormat, into: BothWays | None
) -> BothWays:
    """Cast `tiles`, as `blocks_of` returns them for w, with scales from `amax` [..., R / 128, C / 128]. Returns the
    blocks and their transpose."""
    rows, cols = w.shape[-2:]
    out, transposed = into or empty_both_ways(w)
    out.scales.copy_(scale_of(amax, scales))
    values = scaled(tiles, out.scales[..., :, None, :, None]).flatten(-4, -3).flatten(-2, -1)
    out.values.copy_(values[..., :rows, :cols].to(E4M3))
    _transpose(out, transposed)
    return BothWays(out, transposed)


@kernel_in(KERNELS)
def transpose_blocks(w: Quantized) -> Quantized:
    """128x128 blocks of [..., R, C] -> of the transpose [..., C, R], as `quantize_blocks` makes them."""
    out = empty_transposed(w.values)
    _transpose(w, out)
    return out


def _transpose(w: Quantized, out: Quantized) -> None:
    out.values.copy_(w.values.transpose(-2, -1))
    out.scales.copy_(w.scales.transpose(-2, -1))


@kernel_in(KERNELS)
def pack_e5m6(x: Tensor) -> E5M6:
    """[R, C], C a multiple of 128, to 12 bits a value with power-of-two scales per 1x128 tile."""
    tiles = tiles_of(x)  # [R, B, 128]
    scales = empty_scales(x.shape[0], x.shape[1], x.device)
    scales.copy_(scale_of(tiles.abs().amax(-1), "ue8m0", E5M6_MAX))
    code = _e5m6(scaled(tiles, scales.unsqueeze(-1)))
    low = (code[..., :64] & 15) | ((code[..., 64:] & 15) << 4)
    return E5M6((code >> 4).to(torch.uint8).flatten(1), low.to(torch.uint8).flatten(1), scales)


def _e5m6(x: Tensor) -> Tensor:
    """FP32 -> the 12 bits, int32: FP16 rounded to nearest even at six bits of mantissa, without its last four."""
    bits = x.view(torch.int32)
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) & ~0x1FFFF).view(torch.float32)
    # Below 2^-14 steps are 2^-20: adding 8, whose own step that is, rounds to them.
    tiny = torch.copysign((x.abs() + 8.0) - 8.0, x)
    half = torch.where(x.abs() < 2.0**-14, tiny, normal).half()
    return (half.view(torch.int16).int() & 0xFFFF) >> 4


@kernel_in(KERNELS)
def unpack_e5m6(packed: E5M6, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[R, C] again; exact in BF16 and FP32."""
    low = packed.low.int().unflatten(-1, (-1, 64))
    code = (packed.high.int().unflatten(-1, (-1, TILE)) << 4) | torch.cat((low & 15, low >> 4), -1)
    half = (code << 4).to(torch.int16).view(torch.float16)
    return (half.float() * packed.scales.unsqueeze(-1)).flatten(1).to(dtype)
