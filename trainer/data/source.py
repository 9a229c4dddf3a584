"""Sequences by their number in the run.

The sequences of a run are numbered 0, 1, 2, ... over all steps and data ranks. Which numbers a rank reads at a step is
arithmetic on the step, so every layout, resume and batch ramp reads the same sequence under the same number. There is
no loader state, worker process or prefetch: a window is a slice of memory-mapped tokens, and reading a microbatch takes
microseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import SplitName
from dryvine.trainer.data.order import SequenceOrder
from dryvine.trainer.data.packed_tokens import PackedTokens


class TooShort(DataError):
    """A split is shorter than one sequence."""


class TokenLine(Protocol):
    """One split as a line of tokens: a folder's `PackedTokens`, or `MegatronTokens`."""

    def __len__(self) -> int: ...

    def tokens(self, start: int, length: int) -> NDArray[np.integer]:
        """`length` tokens from `start`, [length]. Raises IndexError outside of [0, len]."""
        ...

    def ends_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where documents end after `start` and before `stop`: ascending."""
        ...


class SequenceSource(Protocol):
    """What a run reads: one split of one dataset, or of several."""

    def sequences(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        """Sequences first, first + stride, ... of the run, over epochs: int64 [count, seq_len + extra]."""
        ...

    def documents(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        """The number of each of these tokens' documents, from 0 in each sequence: int64 [count, seq_len + extra]."""
        ...


@runtime_checkable
class PartlyLearnt(SequenceSource, Protocol):
    """A source whose tokens partly have no loss, such as what users said."""

    def learnt(self, first: int, count: int, stride: int = 1) -> NDArray[np.bool_]:
        """bool [count, seq_len + extra]: which of these tokens have a loss."""
        ...


class TokenSource:
    """One split of a dataset, given by its folder or as a line, cut into windows. Window w is the seq_len + extra
    tokens from w * seq_len on.

    extra = 1 + mtp_depth: tokens past the end that only the last positions predict. Neighbouring windows overlap by
    that much, so every token is an input once and a next-token target once in each epoch.
    Raises TooShort if the split is shorter than one window.
    """

    def __init__(
        self, source: Path | TokenLine, split: SplitName, seq_len: int, extra: int, seed: int, stream: int = 0
    ) -> None:
        self.packed: TokenLine = PackedTokens(source, split) if isinstance(source, Path) else source
        self.seq_len, self.length = seq_len, seq_len + extra
        self.windows = (len(self.packed) - extra) // seq_len
        if self.windows < 1:
            raise TooShort(
                f"{source}: {split} has {len(self.packed)} tokens and one sequence needs {self.length}; "
                "add text, lower data.seq_len, or hold out a larger fraction if it is val"
            )
        self.order = SequenceOrder(seed, self.windows, stream)

    def sequences(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        """Sequences first, first + stride, ... of the run, over epochs: int64 [count, seq_len + extra]."""
        out = np.empty((count, self.length), np.int64)
        for i in range(count):
            out[i] = self.packed.tokens(self.order.window(first + i * stride) * self.seq_len, self.length)
        return out

    def documents(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        """As in `SequenceSource`. The part of a document in another window counts as another document."""
        out = np.empty((count, self.length), np.int64)
        for i in range(count):
            start = self.order.window(first + i * stride) * self.seq_len
            ends = self.packed.ends_between(start, start + self.length)
            out[i] = np.searchsorted(ends, np.arange(start, start + self.length), side="right")
        return out
