"""An engine for each kind of product, since none is fastest for all: cuBLAS has the better dense kernels, our own ones
support experts and add weight gradients in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dryvine.trainer.fp8.engines.protocol import Products
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized

KINDS = ("dense products", "grouped products", "weight gradients")


@dataclass(frozen=True)
class Mixed(Products):
    """`Products` by one engine of each of KINDS, in that order."""

    dense: Products
    grouped: Products
    gradients: Products

    @property
    def reads_counts(self) -> bool:
        return self.grouped.reads_counts or self.gradients.reads_counts

    def product(
        self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        return (self.dense if groups is None else self.grouped).product(a, b, groups, dtype)

    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        self.gradients.wgrad(a, b, groups, total)
