"""The reference engine: the arithmetic of the recipe in plain torch, on any machine, with a choice of accumulator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dryvine.trainer.fp8.engines.in_turn import InTurn
from dryvine.trainer.fp8.recipe import Accumulator
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.tiles import TILE


@dataclass(frozen=True)
class Emulate(InTurn):
    """`accumulator="fp32"` sums in FP32 all through, which makes the whole product one matmul of the values read back:
    the partial sums per 128 of K differ from it by the order of FP32 additions only.

    "hopper" models the tensor cores instead: the running sum is cut (toward zero) to 14 bits after each instruction's
    32 products, and moved to an FP32 sum every `promotion` of K (0: never). The alignment of the 32 products to the
    largest, which loses a little more, is not modelled.
    """

    accumulator: Accumulator = "fp32"
    promotion: int = TILE

    @staticmethod
    def missing(device: torch.device) -> str | None:
        return None

    def single(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        left, right = a.dequantize(), b.dequantize()
        if self.accumulator == "fp32":
            return (left @ right.t()).to(dtype)
        total = torch.zeros(len(left), len(right), device=left.device)
        step = self.promotion or left.shape[1]
        for first in range(0, left.shape[1], step):
            total += _hopper(left[:, first : first + step], right[:, first : first + step])
        return total.to(dtype)


def _hopper(a: Tensor, b: Tensor) -> Tensor:
    """A Bᵀ with an accumulator of 14 significant bits, in instructions of 32."""
    total = torch.zeros(len(a), len(b), device=a.device)
    for first in range(0, a.shape[1], 32):
        total.addmm_(a[:, first : first + 32], b[:, first : first + 32].t())
        # Keep 1 + 13 of FP32's 1 + 23 significant bits.
        total.view(torch.int32).bitwise_and_(~0x3FF)
    return total
