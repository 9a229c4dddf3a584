"""What quantisation did to tensors, counted: tiles that held NaN or infinity, and tiles whose amax was at the floor.

A bad tile's scale is infinite and a floored tile's is the smallest there is, so both are read off the scales (1/128 of
the data) that the casts leave anyway; with online amax nothing else can saturate. Counts stay on the device until they
are asked for: reading them where they are made would stop the host at every Linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.tiles import AMAX_FLOOR, E4M3_MAX


class Count(NamedTuple):
    """Tiles of one tensor role ("layers.3.attention.o.weight: input") since the last `take`."""

    name: str
    bad: int  # held a NaN or an infinity
    floored: int  # amax below 1e-4: every value of the tile lost precision
    tiles: int


@dataclass
class Guard:
    """Counts while `on`; whoever drives the steps turns it on for those to be counted."""

    on: bool = False
    _counts: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # (weight's id, role) -> bad, floored, tiles

    def count(self, weight: Tensor, role: str, q: Quantized) -> None:
        if not self.on:
            return
        scales = q.scales
        # The smallest scale, or the power of two above it.
        floored = scales <= AMAX_FLOOR / E4M3_MAX * 1.0001
        both = torch.stack((scales.isinf().sum(), floored.sum(), torch.full_like(floored, True).sum()))
        before = self._counts.get((id(weight), role))
        self._counts[id(weight), role] = both if before is None else before + both

    def take(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[Count]:
        """The counts since the last take, by name; waits for the device once a role. Resets them."""
        names = {id(weight): name for name, weight in named}
        counts, self._counts = self._counts, {}
        for (weight, role), count in counts.items():
            yield Count(f"{names.get(weight, '?')}: {role}", *count.tolist())


def culprits(gradients: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Names whose FP32 gradient sum is not finite: what to print beside the rank when a step has to be skipped."""
    return [name for name, gradient in gradients if gradient is not None and not bool(gradient.isfinite().all())]
