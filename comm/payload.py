"""Rows of several tensors as one wire row, so that a hop is one collective whatever the payload.

BF16 rows, or FP8 values with their scales, travel with the routing weight of each copy in one buffer of 64-bit lanes:
a lane is what gathers copy fastest, and no backend has to know FP8 (gloo and NCCL refuse it). One collective per
tensor would pay the latency of every hop two or three times and let a payload arrive in parts.

Each tensor starts on a lane, so that on arrival it is a view of the buffer. The gather that brings rows into sending
order writes straight into the buffer, and the one that orders what came reads straight out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

LANE = torch.int64
LANE_BYTES = 8


@dataclass(frozen=True)
class Column:
    """One tensor's part of a wire row: `width` lanes from lane `start`."""

    dtype: torch.dtype
    tail: tuple[int, ...]
    start: int
    width: int

    @property
    def bytes(self) -> int:
        return prod(self.tail) * self.dtype.itemsize


@dataclass(frozen=True)
class Format:
    """How a payload's tensors lie in a wire row; both ends derive it from tensors of equal dtype and row shape."""

    columns: tuple[Column, ...]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Format:
        columns: list[Column] = []
        start = 0
        for tensor in tensors:
            width = -(-prod(tensor.shape[1:]) * tensor.element_size() // LANE_BYTES)
            columns.append(Column(tensor.dtype, tuple(tensor.shape[1:]), start, width))
            start += width
        return Format(tuple(columns))

    @property
    def lanes(self) -> int:
        return sum(column.width for column in self.columns)

    @property
    def bytes(self) -> int:
        """Bytes of one wire row."""
        return self.lanes * LANE_BYTES

    def pack(
        self, tensors: Sequence[Tensor], indexes: Sequence[Tensor] | None = None, into: Tensor | None = None
    ) -> Tensor:
        """Rows `indexes[i]` of each tensor (all of one length R; None: as they lie) as a buffer [R, lanes]."""
        if indexes is None and len(tensors) == 1:
            return as_lanes(tensors[0])
        if indexes is None:
            return torch.cat([as_lanes(tensor) for tensor in tensors], dim=1)
        buffer = tensors[0].new_empty((len(indexes[0]), self.lanes), dtype=LANE) if into is None else into
        for column, tensor, index in zip(self.columns, tensors, indexes, strict=True):
            into = buffer[:, column.start : column.start + column.width]
            torch.index_select(as_lanes(tensor), 0, index, out=into)
        return buffer

    def unpack(self, buffer: Tensor, index: Tensor | None = None, holes: Tensor | None = None) -> list[Tensor]:
        """The tensors again, rows in the order of `index` (as they lie if None), and zero at `holes`."""
        out = []
        for column in self.columns:
            rows = buffer[:, column.start : column.start + column.width]
            rows = rows.contiguous() if index is None else rows.index_select(0, index)
            if holes is not None and len(holes):
                rows.index_fill_(0, holes, 0)
            out.append(_as_rows(rows, column))
        return out


def as_lanes(tensor: Tensor) -> Tensor:
    """The tensor's rows as lanes, [R, width]; a copy only where a row is no whole number of lanes or not aligned."""
    rows, row_bytes = len(tensor), prod(tensor.shape[1:]) * tensor.element_size()
    flat = tensor.reshape(rows, prod(tensor.shape[1:])).contiguous()
    if row_bytes % LANE_BYTES == 0 and flat.storage_offset() * flat.element_size() % LANE_BYTES == 0:
        return flat.view(LANE)
    padded = flat.new_zeros((rows, -(-row_bytes // LANE_BYTES) * LANE_BYTES), dtype=torch.uint8)
    padded[:, :row_bytes] = flat.view(torch.uint8)
    return padded.view(LANE)


def _as_rows(lanes: Tensor, column: Column) -> Tensor:
    if column.bytes % LANE_BYTES == 0:
        return lanes.view(column.dtype).reshape(len(lanes), *column.tail)
    exact = lanes.view(torch.uint8)[:, : column.bytes].contiguous()
    return exact.view(column.dtype).reshape(len(lanes), *column.tail)
