"""Sequences by their number in the run.

The trainer numbers the sequences of a run 0, 1, 2, ... over all steps and data ranks; which number a rank reads at a
step is its own arithmetic, so any layout, any resume and any batch ramp reads the same sequence under the same number.
There is no loader with a state, no worker process and no prefetch: a window is a slice of mapped memory, and reading a
microbatch takes microseconds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import PackedTokens, SplitName
from dryvine.trainer.data.order import Order


class TokenSource:
    """Window w of a split is its tokens from w * seq_len on, seq_len + extra of them.

    extra = 1 + mtp_depth: the tokens past the end that the last positions predict. Neighbouring windows overlap by
    that much, so every token is an input once and a next-token target once in each epoch.
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
        self.order = Order(seed, self.windows)

    def sequences(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        """Sequences first, first + stride, ... of the run: int64 [count, seq_len + extra]; epoch after epoch."""
        out = np.empty((count, self.length), np.int64)
        for i in range(count):
            out[i] = self.packed.tokens(self.order.window(first + i * stride) * self.seq_len, self.length)
        return out
