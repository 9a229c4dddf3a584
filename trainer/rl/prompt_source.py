"""The data source of a run that samples its own data: the task, and rows of zeros for the rehearsed step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.rl.questions import RLTask


class PromptSource:
    """A `SequenceSource` of rows of `length` zeros. Training never learns from them."""

    def __init__(self, task: RLTask, length: int) -> None:
        self.task, self.length = task, length

    def sequences(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        return np.zeros((count, self.length), np.int64)

    def documents(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        return np.zeros((count, self.length), np.int64)
