"""Own kernels as an engine (fp8/kernels/hopper.py): dense, grouped, and grouped wgrad that adds in place."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from dryvine.trainer.fp8.engines.operands import no_hopper
from dryvine.trainer.fp8.engines.protocol import Engine
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized


@dataclass(frozen=True)
class Triton(Engine):
    """K and N are multiples of 16 (TMA's alignment)."""

    reads_counts = False

    @staticmethod
    def missing(device: torch.device) -> str | None:
        return no_hopper(device) or (None if find_spec("triton") else "needs triton >= 3.6: pip install triton")

    def product(
        self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        from dryvine.trainer.fp8.kernels import hopper

        return hopper.product(a, b, groups, dtype)

    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        from dryvine.trainer.fp8.kernels import hopper

        hopper.wgrad(a, b, groups, total)
