"""Progress of a GPU's streams as counters in host memory, which can be read without a CUDA call.

The thread that enforces deadlines must know the progress exactly when something hangs: loading a kernel holds the
driver's lock until the device is idle, while the device waits for a peer. Querying an event per operation would work
only while nothing hangs. A counter costs the host 4 us per mark and the device nothing.
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
    """Marks in the sequence of a device's work."""

    def mark(self) -> Callable[[], bool]:
        """Mark the current end of the current stream's queue. Returns a function, callable from any thread, that tells
        whether the stream has reached the mark."""
        ...


class StreamWords:
    """`Progress` of a GPU: a word of host memory per stream, which counts the marks that the stream has reached."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = mmap.mmap(-1, STREAMS * 4)
        self._words = np.frombuffer(self._memory, np.int32)
        self._base = map_host_memory(self._words, self)
        self._marks: dict[int, tuple[int, int]] = {}  # by the stream's handle: its word, and how many marks it has

    def mark(self) -> Callable[[], bool]:
        stream = torch.cuda.current_stream(self.device)
        word, before = self._marks.get(stream.cuda_stream, (len(self._marks), 0))
        number = before + 1
        self._marks[stream.cuda_stream] = word, number
        write_value(stream, self._base + 4 * word, number & 0xFFFFFFFF)
        return lambda: (int(self._words[word]) - number) & 0xFFFFFFFF < 1 << 31  # cyclic: 32 bits may overflow
