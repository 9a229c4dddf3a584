"""The FP8 format of dispatched rows: E4M3 values, and a one-byte scale for each 1x128 tile.

The scales are powers of two (arXiv 2412.19437, section 3.3.3), so FP32's exponent is enough: 56 bytes for 7168 values,
where four-byte scales would be 224. A tile that held a NaN or an infinity has the exponent of infinity, so that the
fault is preserved.

A token is quantised once before it is sent, not once for each of its experts; received rows are operands of Fprop, or
of Dgrad, without further casts. Legend: N rows sent, R rows received, H hidden, B tiles a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dryvine.trainer.fp8 import casts
from dryvine.trainer.tensors.quantized import E4M3, empty_scales

MANTISSA = 23  # bits below the exponent of FP32


class Tiles:
    """A `Codec`: [N, H] -> bytes of values [N, H] and exponents [N, B] -> E4M3 [R, H] and FP32 scales [R, B]."""

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        q = casts.quantize_rows(rows.detach().contiguous(), "ue8m0")
        exponents = torch.empty(q.scales.shape, dtype=torch.uint8, device=rows.device)
        # Bytes, since neither gloo nor gathers on a CPU support FP8.
        return q.values.view(torch.uint8), exponents.copy_(q.scales.view(torch.int32) >> MANTISSA)

    def decode(self, sent: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values, exponents = sent
        scales = empty_scales(len(values), values.shape[1], values.device)
        scales.view(torch.int32).copy_(exponents).bitwise_left_shift_(MANTISSA)  # 255 is infinity
        return values.view(E4M3), scales
