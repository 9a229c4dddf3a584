"""Measures how long compute stood still for communication that runs beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stalls:
    """Seconds of waits, on a CPU of the host; on a GPU of the stream that is current around them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Context around a wait."""
        if not self._cuda:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._events.append((before, after))

    def take(self) -> float:
        """The seconds since the last call. Waits for the device."""
        for before, after in self._events:
            after.synchronize()
            self._seconds += before.elapsed_time(after) / 1e3
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds
