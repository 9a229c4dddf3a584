"""Row counts that stay on the device until somebody asks for one.

On a single rank there are as many rows as pairs, whatever the gate chose, so nothing that is sized on the host depends
on the counts. Reading them anyway would stop the host once per layer and microbatch, and no CUDA graph could contain
the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import overload

from torch import Tensor


class DeviceCounts(Sequence[int]):
    """Rows of each expert, int64 [X] on the device, and their sum, on the host. An item waits for the device."""

    def __init__(self, on_device: Tensor, total: int) -> None:
        self.on_device, self.total = on_device, total

    @cached_property
    def _host(self) -> list[int]:
        return [int(count) for count in self.on_device.tolist()]

    def __len__(self) -> int:
        return len(self.on_device)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        return self._host[index]
