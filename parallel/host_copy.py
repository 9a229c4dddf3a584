"""Copies between a device and host memory that run beside the device's compute.

On a GPU the host memory is pinned and copies run on a stream of their own, by a copy engine; on a CPU nothing can run
beside, and a copy is made when it is waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dryvine.comm.pending import Pending


class HostCopies:
    """Copies of one device, in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, like: Tensor) -> Tensor:
        """Zeroed host memory for copies of `like`."""
        return torch.zeros(like.shape, dtype=like.dtype, pin_memory=self._stream is not None)

    def fetch(self, made: Pending[None], source: Tensor, target: Tensor) -> Pending[None]:
        """Copy `source`, on the device, to `target` on the host once `made` is complete. The result's `wait` blocks
        the host."""
        if self._stream is None:

            def copy() -> None:
                made.wait()
                target.copy_(source)

            return Pending(copy, made.ready)
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            made.wait()  # a wait of the stream
            target.copy_(source, non_blocking=True)
            copied = self._stream.record_event()

        def wait() -> None:
            torch.cuda.current_stream(source.device).wait_event(copied)
            copied.synchronize()

        return Pending(wait, copied.query)

    def put(self, source: Tensor, target: Tensor) -> None:
        """Copy `source`, on the host, to `target` on the device, in the current stream and in the target's dtype."""
        if self._stream is None:
            target.copy_(source)
        else:
            target.copy_(source.to(target.dtype).pin_memory(), non_blocking=True)
