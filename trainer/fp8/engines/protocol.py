"""FP8 matrix products, y = A Bᵀ and the accumulation of dW: what an engine must do. One file here for each.

`emulate` is the reference: the arithmetic of the recipe in plain torch, on any machine. The others are the same two
functions on a GPU. A new engine is a class like these in a file of its own, and its line in names.py.

Legend: A [M, K] in 1x128 tiles; B [N, K], or [X, N, K] by expert, in 128x128 blocks; P rows padded by expert to 128.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized


class Products(Protocol):
    """The FP8 matrix products of one rank."""

    @property
    def reads_counts(self) -> bool:
        """Whether the host reads how many rows each expert has, and so waits for the device where it does not know."""
        ...

    def product(
        self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """[M, K] x [N, K] -> [M, N]; with groups, each expert's rows of A by its own B [X, N, K]. Fprop and Dgrad."""
        ...

    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        """total[x] += A_x B_xᵀ over each expert's padded rows: [M, P] x [N, P] -> FP32 [X, M, N]."""
        ...


class Engine(Products, Protocol):
    """Products by one library or set of kernels, which a machine may not support."""

    reads_counts: bool = True

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Why this engine cannot run on `device`, and how to fix that; None if it can."""
        ...
