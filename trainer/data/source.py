"""Sequences by their number in the run.

The sequences of a run are numbered 0, 1, 2, ... over all steps and data ranks. Which numbers a rank reads at a step is
arithmetic on the step, so every layout, resume and batch ramp reads the same sequence under the same number. There is
no loader state, worker process or prefetch: a window is a slice of memory-mapped tokens, and reading a microbatch takes
microseconds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import SplitName
from dryvine.trainer.data.order import SequenceOrder
from dryvine.trainer.data.packed_tokens import PackedTokens


class TokenSource:
    """One split of a dataset, cut into windows. Window w is the seq_len + extra tokens from w * seq_len on.

    extra = 1 + mtp_depth: tokens past the end that only the last positions predict. Neighbouring windows overlap by
    that much, so every token is an input once and a next-token target once in each epoch.
    Raises DataError if the split is shorter than one window.
    """

    def __init__(self, folder: Path, split: SplitName, seq_len: int, extra: int, seed: int) -> None:
        self.packed = PackedTokens(folder, split)
        self.seq_len, self.length = seq_len, seq_len + extra
        self.windows = (len(self.packed) - extra) // seq_len
        if self.windows < 1:
            raise DataError(
                f"{folder}: {split} has {len(self.packed)} tokens and one sequence needs {self.length}; "
                "add text, lower data.seq_len, or hold out a larger fraction if it is val"
            )
        self.order = SequenceOrder(seed, self.windows)

    def sequences(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        """Sequences first, first + stride, ... of the run, over epochs: int64 [count, seq_len + extra]."""
        out = np.empty((count, self.length), np.int64)
        for i in range(count):
            out[i] = self.packed.tokens(self.order.window(first + i * stride) * self.seq_len, self.length)
        return out
