"""Monitoring of quantisation: counts tiles that held a NaN or an infinity, and tiles whose amax was below the floor.

A bad tile's scale is infinite and a floored tile's is the smallest possible, so both are counted from the scales (1/128
of the data) that casts return anyway; with online amax nothing else can saturate. Counts stay on the device until
`take`: reading them at once would block the host at every Linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    """Counts while `on`, which the training step sets for the steps to be counted."""

    on: bool = False
    # (weight's id, role) -> int64 [3]: bad, floored, tiles.
    _counts: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing is counted, for recomputation."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def count(self, weight: Tensor, role: str, q: Quantized) -> None:
        """Count the tiles of q, an operand of a product with `weight`; `role`: "input" or "output gradient"."""
        if not self.on:
            return
        scales = q.scales
        # The smallest FP32 scale. None in powers of two is that small: such recipes count no floored tiles.
        floored = scales <= AMAX_FLOOR / E4M3_MAX * 1.0001
        counts = torch.stack((scales.isinf().sum(), floored.sum(), torch.full_like(floored, True).sum()))
        before = self._counts.get((id(weight), role))
        self._counts[id(weight), role] = counts if before is None else before + counts

    def take(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[Count]:
        """Return the counts since the last `take`, by name, and reset them. Waits for the device once for each role."""
        names = {id(weight): name for name, weight in named}
        counts, self._counts = self._counts, {}
        for (weight, role), count in counts.items():
            yield Count(f"{names.get(weight, '?')}: {role}", *count.tolist())


def culprits(gradients: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of tensors that are not finite; reported with the rank when a step is skipped."""
    return [name for name, gradient in gradients if gradient is not None and not bool(gradient.isfinite().all())]
