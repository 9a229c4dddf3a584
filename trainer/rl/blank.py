"""The source of a run that samples its own data: rows of one document of zeros, for the step that is rehearsed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Blank:
    """A `SequenceSource` of rows of `length` tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def sequences(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        return np.zeros((count, self.length), np.int64)

    def documents(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        return np.zeros((count, self.length), np.int64)
