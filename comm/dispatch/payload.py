"""Rows of several tensors as one wire row, so that a hop is one collective whatever the payload.

BF16 rows, or FP8 values with their scales, travel with the routing weight of each copy in one buffer of 64-bit words:
a word is what gathers copy fastest, and no backend has to know FP8 (gloo and NCCL refuse it). One collective per
tensor would pay the latency of every hop two or three times and let a payload arrive in parts.

Each tensor starts on a word, so that on arrival it is a view of the buffer. The gather that brings rows into sending
order writes straight into the buffer; what orders or sums the arrived rows reads straight out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from dryvine.comm.by_device import kernel_in
from dryvine.comm.integers import ceil_div, round_up

KERNELS = "dryvine.comm.dispatch.kernels"
WORD = torch.int64
WORD_BYTES = 8


@dataclass(frozen=True)
class Column:
    """One tensor's part of a wire row: `width` words from word `start`."""

    dtype: torch.dtype
    tail: tuple[int, ...]  # the tensor's shape without its first dimension
    start: int
    width: int

    @property
    def bytes(self) -> int:
        return prod(self.tail) * self.dtype.itemsize

    def words(self, buffer: Tensor) -> Tensor:
        return buffer[:, self.start : self.start + self.width]

    def rows(self, words: Tensor) -> Tensor:
        """A view of words [R, width] as rows of the tensor."""
        if self.bytes % WORD_BYTES == 0:
            exact = words.view(self.dtype)
        else:
            exact = words.view(torch.uint8)[:, : self.bytes].view(self.dtype)
        return exact if len(self.tail) == 1 else exact.view(len(words), *self.tail)

    def of(self, buffer: Tensor) -> Tensor:
        return self.rows(self.words(buffer))


@dataclass(frozen=True)
class Format:
    """How a payload's tensors lie in a wire row; both ends derive it from tensors of equal dtype and row shape."""

    columns: tuple[Column, ...]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Format:
        columns: list[Column] = []
        start = 0
        for tensor in tensors:
            width = ceil_div(prod(tensor.shape[1:]) * tensor.element_size(), WORD_BYTES)
            columns.append(Column(tensor.dtype, tuple(tensor.shape[1:]), start, width))
            start += width
        return Format(tuple(columns))

    @property
    def words(self) -> int:
        return sum(column.width for column in self.columns)

    @property
    def bytes(self) -> int:
        """Bytes of one wire row."""
        return self.words * WORD_BYTES

    def pack(
        self, tensors: Sequence[Tensor], indexes: Sequence[Tensor] | None = None, into: Tensor | None = None
    ) -> Tensor:
        """Rows `indexes[i]` of each tensor (all of one length R; None: as they lie) as a buffer [R, words]."""
        if indexes is None and len(tensors) == 1:
            return as_words(tensors[0])
        if indexes is None:
            return torch.cat([as_words(tensor) for tensor in tensors], dim=1)
        buffer = tensors[0].new_empty((len(indexes[0]), self.words), dtype=WORD) if into is None else into
        gather_in(buffer, self.columns, tensors, indexes)
        return buffer

    def unpack(self, buffer: Tensor, index: Tensor | None = None) -> list[Tensor]:
        """The tensors again, as views of the buffer; with `index`, copies: row index[i] at i, zeros if negative."""
        if index is None:
            return [column.of(buffer) for column in self.columns]
        return gather_out(buffer, self.columns, index)


@kernel_in(KERNELS)
def gather(rows: Tensor, index: Tensor) -> Tensor:
    """Rows index[i] of [N, ...], zeros where the index is negative."""
    if not len(rows):
        return rows.new_zeros((len(index), *rows.shape[1:]))
    picked = rows.index_select(0, index.clamp(min=0))
    holes = (index < 0).nonzero().flatten()
    picked.view(len(picked), prod(picked.shape[1:])).view(torch.uint8).index_fill_(0, holes, 0)
    return picked


@kernel_in(KERNELS)
def gather_in(buffer: Tensor, columns: Sequence[Column], tensors: Sequence[Tensor], indexes: Sequence[Tensor]) -> None:
    """Write rows indexes[i] of each tensor into its column; no index is negative."""
    for column, tensor, index in zip(columns, tensors, indexes, strict=True):
        torch.index_select(as_words(tensor), 0, index, out=column.words(buffer))


@kernel_in(KERNELS)
def gather_out(buffer: Tensor, columns: Sequence[Column], index: Tensor) -> list[Tensor]:
    """`gather` of each column, as a tensor of its own."""
    return [column.rows(gather(column.words(buffer), index)).contiguous() for column in columns]


def as_words(tensor: Tensor) -> Tensor:
    """The tensor's rows as words, [R, width]; a copy only where a row is no whole number of words or not aligned."""
    rows, row_bytes = len(tensor), prod(tensor.shape[1:]) * tensor.element_size()
    flat = tensor.reshape(rows, prod(tensor.shape[1:])).contiguous()
    if row_bytes % WORD_BYTES == 0 and flat.storage_offset() * flat.element_size() % WORD_BYTES == 0:
        return flat.view(WORD)
    padded = flat.new_zeros((rows, round_up(row_bytes, WORD_BYTES)), dtype=torch.uint8)
    padded[:, :row_bytes] = flat.view(torch.uint8)
    return padded.view(WORD)
