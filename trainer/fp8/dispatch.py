"""Rows as a dispatch carries them in FP8: E4M3 values, and a byte for each 1x128 tile.

The scales are powers of two (arXiv 2412.19437, section 3.3.3), so FP32's exponent is all there is to send: 56 bytes
beside 7168 where four-byte scales would be 224. A tile that held a NaN or an infinity has the exponent of infinity, and
so arrives as loud as it left.

A token is quantised before it leaves, not once for each expert it goes to; what arrives is the operand of Fprop, or of
Dgrad, as it is. Legend: N rows sent, R rows arrived, H hidden, B tiles a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dryvine.trainer.fp8 import casts
from dryvine.trainer.tensors.quantized import E4M3, empty_scales

MANTISSA = 23  # bits below the exponent of FP32


class Tiles:
    """`Codec`: [N, H] -> bytes of values [N, H] and exponents [N, B]; arrived, E4M3 [R, H] and FP32 scales [R, B]."""

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        q = casts.quantize_rows(rows.detach().contiguous(), "ue8m0")
        exponents = torch.empty(q.scales.shape, dtype=torch.uint8, device=rows.device)
        # Bytes, since neither gloo nor gathers on a CPU know FP8.
        return q.values.view(torch.uint8), exponents.copy_(q.scales.view(torch.int32) >> MANTISSA)

    def decode(self, sent: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values, exponents = sent
        scales = empty_scales(len(values), values.shape[1], values.device)
        scales.view(torch.int32).copy_(exponents).bitwise_left_shift_(MANTISSA)  # 255 is infinity
        return values.view(E4M3), scales
