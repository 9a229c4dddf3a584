"""Rotary positions on the decoupled rope dimensions, with YaRN (arXiv 2309.00071) when the context is extended.

Released DeepSeek weights rotate neighbouring pairs (0,1), (2,3), ...; the result is laid out as all first members, then
all second ones. Queries and keys share that layout, so scores are those of the official code, and no copy back is due.

Legend: S sequences, T positions, D rope dimensions.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dryvine.trainer.model.documents import Documents
from dryvine.trainer.model.shape import Shape, Yarn


class Rope:
    """The angles of a model. Tables are FP32, made once for each length and device, for all layers of a rank."""

    def __init__(self, shape: Shape) -> None:
        self.frequencies = frequencies(shape.rope_dim, shape.rope_theta, shape.yarn)
        self.scale = rotation_scale(shape.yarn)
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._packed: WeakKeyDictionary[Documents, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, 1, D/2]."""
        if (length, device) not in self._tables:
            angles = torch.outer(torch.arange(length, dtype=torch.float32), self.frequencies).unsqueeze(1)
            self._tables[length, device] = (
                (angles.cos() * self.scale).to(device),
                (angles.sin() * self.scale).to(device),
            )
        return self._tables[length, device]

    def packed(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """(cos, sin) of each token of a microbatch by its place in its document, each [N, 1, D/2]. Kept as long as the
        microbatch, for all layers."""
        if documents not in self._packed:
            cos, sin = self.table(documents.longest, documents.positions.device)
            self._packed[documents] = cos[documents.positions], sin[documents.positions]
        return self._packed[documents]


def rotate(x_STHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of the last dimension by its position's angle: in FP32, rounded once to x's dtype."""
    a, b = x_STHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_STHD.dtype)


def frequencies(dim: int, theta: float, yarn: Yarn | None) -> Tensor:
    """Radians per position of each pair, FP32 [dim/2]."""
    plain = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None:
        return plain
    # Pairs before `first` turn often enough within the original context and stay; those after `last` are slowed by
    # the whole factor. dim - 1, not dim / 2 - 1, is what the official code has.
    low, high = (_pair_that_turns(turns, dim, theta, yarn.original) for turns in (yarn.beta, yarn.alpha))
    first, last = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - first) / max(last - first, 0.001)
    slowed = ramp.clamp(0, 1)
    return plain / yarn.factor * slowed + plain * (1 - slowed)


def _pair_that_turns(turns: float, dim: int, theta: float, length: int) -> float:
    """The (fractional) number of the pair that makes `turns` whole turns over `length` positions."""
    return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _mscale(factor: float, weight: float) -> float:
    """m(weight) of YaRN: how much attention sharpens in a context that is `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1.0


def rotation_scale(yarn: Yarn | None) -> float:
    """What rotated parts are multiplied by."""
    return 1.0 if yarn is None else _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(shape: Shape) -> float:
    """1/sqrt(query width), raised by YaRN's temperature, as DeepSeek applies it."""
    temperature = 1.0 if shape.yarn is None else _mscale(shape.yarn.factor, shape.yarn.mscale_all_dim) ** 2
    return shape.qk_dim**-0.5 * temperature
