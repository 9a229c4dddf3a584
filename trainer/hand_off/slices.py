"""Cuts parameters into slices: the slice size bounds the memory of an export or an import."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from dryvine.trainer.hand_off.names import Mapped
from dryvine.trainer.tensors.tiles import TILE

# Elements of a slice: 32 MiB in FP32. With what a cast needs beside it (FP8: padded, scaled, as bytes, and transposed
# once) that stays under 256 MiB.
SLICE = 1 << 23


class Slice(NamedTuple):
    """Rows first..first+rows of a place; each element of a vector is a row."""

    place: Mapped
    first: int
    rows: int

    @property
    def cols(self) -> int:
        return math.prod(self.place.shape[1:])

    @property
    def start(self) -> int:
        """Its first element in our parameter."""
        return self.place.first + self.first * self.cols

    @property
    def elements(self) -> int:
        return self.rows * self.cols

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.place.shape[1:])


def slices(place: Mapped) -> Iterator[Slice]:
    """The slices of a place, cut at multiples of a block's rows."""
    rows, cols = place.shape[0], math.prod(place.shape[1:])
    step = max(TILE, SLICE // cols // TILE * TILE)
    return (Slice(place, first, min(step, rows - first)) for first in range(0, rows, step))
