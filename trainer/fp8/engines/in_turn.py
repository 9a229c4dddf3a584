"""Engines that multiply one pair of matrices at a time, and so take experts in turn."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from dryvine.trainer.fp8.engines.operands import by_expert, by_range
from dryvine.trainer.fp8.engines.protocol import Engine
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized


class InTurn(Engine):
    """`Engine` on top of `single`."""

    @abstractmethod
    def single(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        """A Bᵀ of one pair: [M, K] x [N, K] -> [M, N]."""

    def product(
        self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        if groups is None:
            return self.single(a, b, dtype)
        y = torch.empty(len(a.values), b.values.shape[-2], dtype=dtype, device=a.values.device)
        for rows, part_a, part_b in by_expert(a, b, groups):
            y[rows] = self.single(part_a, part_b, dtype)
        return y

    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        for expert, part_a, part_b in by_range(a, b, groups):
            total[expert] += self.single(part_a, part_b, torch.float32)
