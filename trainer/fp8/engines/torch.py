"""cuBLASLt through torch.nn.functional.scaled_mm as an engine. It has no grouped product, so experts are multiplied in
turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.trainer.fp8.engines.in_turn import InTurn
from dryvine.trainer.fp8.engines.operands import filled, no_hopper, token_major
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.tiles import TILE

SCALING = {(1, TILE): functional.ScalingType.BlockWise1x128, (TILE, TILE): functional.ScalingType.BlockWise128x128}


@dataclass(frozen=True)
class Torch(InTurn):
    """K and N are multiples of 16."""

    @staticmethod
    def missing(device: torch.device) -> str | None:
        if reason := no_hopper(device):
            return reason
        version = torch.version.cuda or "0.0"
        old = tuple(map(int, version.split("."))) < (12, 9)
        return f"needs CUDA 12.9 or later for block scales; this torch has {version}" if old else None

    def single(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        """scaled_mm wants whole rows, so slices of K are copied, and a multiple of 4 rows."""
        whole = filled(a, 4)
        y = functional.scaled_mm(
            whole.values.contiguous(),
            b.values.contiguous().t(),
            token_major(whole.scales),
            SCALING[a.tile],
            token_major(b.scales) if b.tile[0] == 1 else _padded_transposed(b.scales),
            SCALING[b.tile],
            output_dtype=dtype,
        )
        return y[: len(a.values)]


def _padded_transposed(scales: Tensor) -> Tensor:
    """Scales of blocks [N / 128, K / 128] as [K / 128 rounded up to 4, N / 128]: those of K side by side in memory,
    with the room that `empty_blocks` left at the ends of rows."""
    width = scales.stride(0)
    return scales.as_strided((width, len(scales)), (1, width), scales.storage_offset())
