"""Host buffers that a run's state is copied to, so that a step may change the state while the copy is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dryvine.trainer.checkpoint.files import Place


class Staging:
    """Buffers that every save reuses; pinned for a GPU, whose copy engine then writes at the speed of the bus."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._copies: dict[Place, Tensor] = {}

    def prepare(self, tensors: Mapping[Place, Tensor]) -> None:
        """Allocate the buffers now, so that the first copy takes no longer than later ones."""
        self._copies = {
            place: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._cuda).zero_()  # touches its pages
            for place, tensor in tensors.items()
        }

    def copy(self, tensors: Mapping[Place, Tensor]) -> Mapping[Place, Tensor]:
        """The tensors' present values; valid until the next copy."""
        if not self._copies:
            self.prepare(tensors)
        for place, tensor in tensors.items():
            self._copies[place].copy_(tensor, non_blocking=True)
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        return self._copies
