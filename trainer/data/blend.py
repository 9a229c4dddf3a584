"""Several sources read as one: the `[[data.blend]]` of a config.

`BlendOrder` says which source sequence n comes from, and the source's own `SequenceOrder` which window it reads, so a
blend has no state either. Mixing texts when a dataset is built would fix the shares for good, and trying another share
would cost another tokenization.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.data.blend_order import LARGEST_BLOCK, BlendOrder, whole_weights
from dryvine.trainer.data.config import BlendEntry, DataError
from dryvine.trainer.data.source import TokenSource


class BlendPart(NamedTuple):
    """A source of a blend."""

    entry: BlendEntry
    source: TokenSource

    @property
    def sequences(self) -> Fraction:
        """The sequences of it in the blend, or its weight."""
        if self.entry.tokens:
            return Fraction(self.entry.tokens, self.source.seq_len)
        return _fraction(self.entry.epochs) * self.source.windows if self.entry.epochs else _fraction(self.entry.weight)


class Blend:
    """The training splits of several sources as one source. Raises DataError for shares that no order can keep."""

    def __init__(self, parts: Sequence[BlendPart]) -> None:
        self.parts = tuple(parts)
        self.limit = self._limit()
        self.order = BlendOrder(self._counts() if self.limit else whole_weights([part.sequences for part in parts]))
        self._check_shares()

    def _counts(self) -> list[int]:
        """Whole sequences of each source, for sources given by tokens or epochs."""
        return [max(1, int(part.sequences)) for part in self.parts]

    def _limit(self) -> int | None:
        """The sequences of the whole blend; None if sources have weights and repeat without end."""
        return None if self.parts[0].entry.weight else sum(self._counts())

    def _check_shares(self) -> None:
        for part, weight in zip(self.parts, self.order.weights, strict=True):
            if weight * LARGEST_BLOCK < self.order.whole:
                raise DataError(
                    f"data.blend: {part.entry.label} is less than a millionth of the blend; "
                    "give it more, leave it out, or build it into another source"
                )

    def check_length(self, sequences: int) -> None:
        """Raise DataError if a run of `sequences` is longer than the blend."""
        if self.limit and sequences > self.limit:
            needed = sequences * self.parts[0].source.seq_len
            raise DataError(
                f"data.blend: its tokens and epochs make {self.limit:,} sequences, and the run reads {sequences:,} "
                f"({needed:,} tokens); lower run.steps, raise tokens or epochs, or give weights, which read on"
            )

    def shares(self) -> list[float]:
        return [weight / self.order.whole for weight in self.order.weights]

    def sequences(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        """As `SequenceSource.sequences`, numbered over the blend."""
        return np.concatenate([source.sequences(k, 1) for source, k in self._places(first, count, stride)])

    def documents(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        """As in `SequenceSource`."""
        return np.concatenate([source.documents(k, 1) for source, k in self._places(first, count, stride)])

    def _places(self, first: int, count: int, stride: int) -> Iterator[tuple[TokenSource, int]]:
        for number in range(first, first + count * stride, stride):
            place = self.order.place(number)
            yield self.parts[place.source].source, place.number

    def lines(self, sequences: int) -> Iterator[str]:
        """What a run of `sequences` reads from each source: lines for the start of the run."""
        width = max(len(part.entry.label) for part in self.parts)
        for part, share, count in zip(self.parts, self.shares(), self.order.counts(sequences), strict=True):
            epochs = count / part.source.windows
            again = "; runs out and is read again" if epochs > 1 else ""
            yield (
                f"data.blend: {part.entry.label:{width}} {share:7.2%}, {count:,} of {sequences:,} sequences, "
                f"{epochs:.2f} epochs of {part.source.windows:,}{again}"
            )


def _fraction(value: float | None) -> Fraction:
    """The decimal number as typed, not its nearest binary one: 0.7 is 7/10."""
    return Fraction(repr(value))
