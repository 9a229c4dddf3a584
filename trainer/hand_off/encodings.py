"""The number types of safetensors exports: FP32, BF16, FP8 in blocks of 128 x 128 with a scale each, or integers.

An encoding turns rows of a matrix into the tensors of the file, and returns the values that a reader gets back. Rows
come in multiples of a block, so a matrix can be written a slice at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.trainer.fp8.casts import quantize_blocks
from dryvine.trainer.hand_off import integers
from dryvine.trainer.hand_off.names import BIAS, Mapped
from dryvine.trainer.tensors.quantized import E4M3, Quantized
from dryvine.trainer.tensors.tiles import TILE, blocks

SCALE = "_scale_inv"  # suffix of the name of a weight's scales
Announced = dict[str, tuple[torch.dtype, tuple[int, ...]]]
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8-block": torch.bfloat16} | dict.fromkeys(
    integers.BITS, torch.bfloat16
)  # of what is in no blocks


class Part(NamedTuple):
    """Rows of one tensor of the file: its elements from `first` on."""

    name: str
    first: int
    values: Tensor


class Encoding(NamedTuple):
    """The number types of a whole export. `ragged`: use FP8 also where blocks do not divide a matrix, which the
    format allows and transformers 5.23 reads wrongly (docs/handoff.md)."""

    dtype: str  # a key of PLAIN
    ragged: bool = False

    def in_fp8(self, place: Mapped) -> bool:
        fits = self.ragged or all(size <= TILE or size % TILE == 0 for size in place.shape)
        return self.dtype == "fp8-block" and place.linear and fits

    def bits(self, place: Mapped) -> int | None:
        """Of integers, if it is written as such."""
        return integers.BITS.get(self.dtype) if place.linear else None

    def tensors(self, place: Mapped) -> Announced:
        """The tensors of the file that store a weight."""
        if bits := self.bits(place):
            return {place.theirs + end: kind for end, kind in integers.announced(bits, *place.shape).items()}
        if not self.in_fp8(place):
            return {place.theirs: (self._plain(place), place.shape)}
        grid = tuple(blocks(size) for size in place.shape)
        return {place.theirs: (E4M3, place.shape), place.theirs + SCALE: (torch.float32, grid)}

    def encode(self, place: Mapped, first: int, rows: Tensor) -> list[Part]:
        """FP32 rows from row `first` on, a multiple of 128, [R, C] (a vector: all of it), as parts of the file's
        tensors. Raises ValueError if they are not finite."""
        if not rows.isfinite().all():
            raise ValueError(f"{place.ours} ({place.theirs}) holds numbers that are not finite")
        if bits := self.bits(place):
            made = integers.quantize(rows, bits)
            return [Part(place.theirs + end, first * part.shape[1], part) for end, part in made.items()]
        cols = place.shape[-1] if len(place.shape) > 1 else 1
        if not self.in_fp8(place):
            return [Part(place.theirs, first * cols, rows.to(self._plain(place)))]
        quantized, _ = quantize_blocks(rows)
        grid = Part(place.theirs + SCALE, first // TILE * blocks(cols), quantized.scales.contiguous())
        return [Part(place.theirs, first * cols, quantized.values), grid]

    def read_back(self, place: Mapped, values: Tensor) -> Tensor:
        """The FP32 values that a reader gets for a whole weight."""
        parts = self.encode(place, 0, values)
        if self.bits(place):
            made = {part.name.removeprefix(place.theirs): part.values for part in parts}
            return integers.dequantize(made, place.shape[1])
        return parts[0].values.float() if len(parts) == 1 else dequantize(parts[0].values, parts[1].values)

    def kept_plain(self, all_places: Mapping[str, Mapped]) -> list[str]:
        """Modules whose matrices stay BF16 only because 128 does not divide them."""
        kept = (name for name, place in all_places.items() if place.linear and not self.in_fp8(place))
        return [name.removesuffix(".weight") for name in kept] if self.dtype == "fp8-block" else []

    def _plain(self, place: Mapped) -> torch.dtype:
        # The choice of experts turns on the last bits of a bias: FP32 in released checkpoints too.
        return torch.float32 if place.ours.endswith(BIAS) else PLAIN[self.dtype]


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """E4M3 [R, C] and scales [R / 128, C / 128], both rounded up -> FP32."""
    return Quantized(values, scales, (TILE, TILE)).dequantize()


def quantization_config(dtype: str, kept: list[str]) -> dict[str, object] | None:
    """Of config.json; None for plain numbers. That of integers is ours, so that others refuse it."""
    if dtype in integers.BITS:
        return {"quant_method": integers.OURS, "bits": integers.BITS[dtype], "block": integers.BLOCK}
    if dtype != "fp8-block":
        return None
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [TILE, TILE],
        "modules_to_not_convert": kept,
    }
