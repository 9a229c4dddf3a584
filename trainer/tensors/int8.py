"""A matrix in 8-bit integers that is multiplied as such, on a CPU.

Few rows of FP32 times many weights is bound by reading the weights. So few rows are multiplied by the integers, with
rows and results in BF16 and sums in FP32, by the operator that torch has for this; it reads a quarter of the bytes. For
many rows, arithmetic takes longer than reading: they are multiplied in FP32 by weights that are widened meanwhile.

The operator reads 32 numbers at a time, also behind the end of a row, so that rows are stored up to a multiple of 32.

Legend: N rows of a product, R = O rows of the matrix, I columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.comm.integers import round_up

FEW = 12  # rows of a product, up to which integers are multiplied
STEP = 32


class Int8(NamedTuple):
    """q * scale, q in -127..127, with a scale for each row. `values` int8 [R, I up to a multiple of 32], `scales` BF16
    [R]."""

    values: Tensor
    scales: Tensor
    columns: int

    @staticmethod
    def empty(rows: int, columns: int) -> Int8:
        """Zeros."""
        values = torch.zeros(rows, round_up(columns, STEP), dtype=torch.int8)
        return Int8(values, torch.ones(rows, dtype=torch.bfloat16), columns)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def write(self, first: int, rows_RI: Tensor) -> None:
        """Round FP32 rows to the nearest integers; `first` is the number of the first one."""
        at = slice(first, first + len(rows_RI))
        scale_R = (rows_RI.abs().amax(1) / 127).bfloat16()
        self.scales[at] = torch.where(scale_R == 0, 1, scale_R)
        q_RI = rows_RI / self.scales[at].float().unsqueeze(1)
        self.values[at, : self.columns] = q_RI.round_().clamp_(-127, 127).to(torch.int8)

    def split(self, rows: int) -> list[Int8]:
        """Matrices of so many rows each, in the same memory."""
        parts = zip(self.values.split(rows), self.scales.split(rows), strict=True)
        return [Int8(*part, self.columns) for part in parts]

    def product(self, x_NI: Tensor) -> Tensor:
        """FP32 x Wᵀ: [N, I] -> [N, O]."""
        if len(x_NI) > FEW:
            return functional.linear(x_NI, self.values[:, : self.columns].float()).mul_(self.scales)
        x = x_NI.bfloat16()
        if self.columns < self.values.shape[1]:
            x = functional.pad(x, (0, self.values.shape[1] - self.columns))
        return torch._weight_int8pack_mm(x.contiguous(), self.values, self.scales).float()


class Plain(NamedTuple):
    """The same of a matrix in FP32 or BF16: `values` [R, I]."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def write(self, first: int, rows_RI: Tensor) -> None:
        self.values[first : first + len(rows_RI)] = rows_RI

    def product(self, x_NI: Tensor) -> Tensor:
        return functional.linear(x_NI, self.values)


Matrix = Int8 | Plain


def empty_matrix(rows: int, columns: int, dtype: torch.dtype) -> Matrix:
    """On a CPU, to be written."""
    if dtype == torch.int8:
        return Int8.empty(rows, columns)
    return Plain(torch.empty(rows, columns, dtype=dtype))
