"""A moving average of the parameters, in CPU memory, updated during the next step (arXiv 2412.19437, 3.2.3).

Each rank averages the FP32 masters that it owns, so the average is sharded, checkpointed and published like them. The
masters are copied to the host on a separate stream, and a host thread adds the copy to the average; the optimizer waits
for that copy before it changes the masters again, and for nothing else. Averaging on the GPU would cost four bytes per
parameter there; the copy costs another four on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Ema:
    """average <- decay * average + (1 - decay) * master, after each update; started from the masters."""

    def __init__(self, masters: Sequence[Tensor], decay: float) -> None:
        """`masters` are FP32, on any one device."""
        self.masters, self.decay = masters, decay
        cuda = bool(masters) and masters[0].is_cuda
        self._stream = torch.cuda.Stream(masters[0].device) if cuda else None
        self._averages, self._copies = ([torch.empty(m.shape, pin_memory=cuda) for m in masters] for _ in range(2))
        self._copied: torch.cuda.Event | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._blend: Future[None] | None = None
        self.restart()

    @property
    def averages(self) -> list[Tensor]:
        """The average of each master, on the CPU and up to date. Raises the thread's exception, if any."""
        self.join()
        return self._averages

    def restart(self) -> None:
        """Reset the averages to the masters."""
        for average, master in zip(self.averages, self.masters, strict=True):
            average.copy_(master)

    def join(self) -> None:
        """Wait until the last update is in the averages. Raises the thread's exception, if any."""
        blend, self._blend = self._blend, None
        if blend is not None:
            blend.result()

    def before_update(self) -> None:
        """Call before the masters change. Makes the GPU's stream, not the host, wait until they have been copied."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def after_update(self) -> None:
        """Copy the present masters, and update the averages with them in the background."""
        # The thread may still be reading the copies of the step before.
        self.join()
        if self._stream is None:
            self._copy()
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._copy()
                self._copied = self._stream.record_event()
        self._blend = self._worker.submit(self._blend_in, self._copied)

    def _copy(self) -> None:
        for copy, master in zip(self._copies, self.masters, strict=True):
            copy.copy_(master, non_blocking=True)

    def _blend_in(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        with torch.no_grad():
            for average, copy in zip(self._averages, self._copies, strict=True):
                average.lerp_(copy, 1 - self.decay)
