"""How far a GPU's streams have come, as words in host memory, so that nobody has to call CUDA to find out.

The thread that enforces deadlines needs an answer exactly when something is stuck: a kernel that is being loaded holds
the driver's lock until the device drains, and the device waits for a peer. An event per operation would do only while
nothing is stuck. A word costs the host 4 us per mark and the device nothing.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from dryvine.comm.stream_values import map_host_memory, write_value

STREAMS = 1024  # words in a page; torch has a few dozen streams


class Progress(Protocol):
    """Marks in the order of what a device does."""

    def mark(self) -> Callable[[], bool]:
        """Note how much the current stream has been given. Returns whether all of that is done: a function for any
        thread."""
        ...


class StreamWords:
    """`Progress` of a GPU: a word per stream, which counts the marks that the stream has come past."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = mmap.mmap(-1, STREAMS * 4)
        self._words = np.frombuffer(self._memory, np.int32)
        self._base = map_host_memory(self._words.ctypes.data, self._words.nbytes)
        self._marks: dict[int, tuple[int, int]] = {}  # by the stream's handle: its word, and how many marks it has

    def mark(self) -> Callable[[], bool]:
        stream = torch.cuda.current_stream(self.device)
        word, before = self._marks.get(stream.cuda_stream, (len(self._marks), 0))
        number = before + 1
        self._marks[stream.cuda_stream] = word, number
        write_value(stream, self._base + 4 * word, number & 0xFFFFFFFF)
        return lambda: (int(self._words[word]) - number) & 0xFFFFFFFF < 1 << 31  # cyclic: 32 bits may overflow
