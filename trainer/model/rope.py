"""Rotary position embedding of the decoupled rope dimensions, with YaRN (arXiv 2309.00071) for extended contexts.

Released DeepSeek weights rotate adjacent pairs (0,1), (2,3), ...; the result has all first members, then all second
ones. Queries and keys have the same order, so scores equal those of the official code, and no copy back is needed.

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
    """The rotation angles of a model. FP32 tables, computed once for each length and device, for all layers of a
    rank."""

    def __init__(self, shape: Shape) -> None:
        self.frequencies = frequencies(shape.rope_dim, shape.rope_theta, shape.yarn)
        self.scale = rotation_scale(shape.yarn)
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._by_member: dict[tuple[int, torch.device], Tensor] = {}
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

    def by_member(self, length: int, device: torch.device) -> Tensor:
        """[T, 2, D]: what each dimension is multiplied by, and its neighbour in the pair, with the sign. For rotations
        that leave dimensions where they are."""
        if (length, device) not in self._by_member:
            cos, sin = (part.squeeze(1) for part in self.table(length, device))
            pairs = torch.stack((cos, cos), -1), torch.stack((-sin, sin), -1)
            self._by_member[length, device] = torch.stack([pair.flatten(1) for pair in pairs], 1)
        return self._by_member[length, device]

    def packed(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """(cos, sin) of each token of a microbatch by its position in its document, each [N, 1, D/2]. Cached for all
        layers as long as the microbatch exists."""
        if documents not in self._packed:
            cos, sin = self.table(documents.row, documents.positions.device)
            self._packed[documents] = cos[documents.positions], sin[documents.positions]
        return self._packed[documents]


def rotate(x_STHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of the last dimension by the angle of its position: in FP32, rounded once to x's dtype."""
    a, b = x_STHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_STHD.dtype)


def frequencies(dim: int, theta: float, yarn: Yarn | None) -> Tensor:
    """Radians per position of each pair, FP32 [dim/2]."""
    plain = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None:
        return plain
    # Pairs before `first` turn often enough within the original context and are kept; those after `last` are slowed by
    # the full factor. dim - 1, not dim / 2 - 1, as in the official code.
    low, high = (_pair_that_turns(turns, dim, theta, yarn.original) for turns in (yarn.beta, yarn.alpha))
    first, last = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - first) / max(last - first, 0.001)
    slowed = ramp.clamp(0, 1)
    return plain / yarn.factor * slowed + plain * (1 - slowed)


def _pair_that_turns(turns: float, dim: int, theta: float, length: int) -> float:
    """The (fractional) number of the pair that makes `turns` whole turns over `length` positions."""
    return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _mscale(factor: float, weight: float) -> float:
    """m(weight) of YaRN: the attention temperature for a context that is `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1.0


def rotation_scale(yarn: Yarn | None) -> float:
    """The factor on the rotated parts of queries and keys."""
    return 1.0 if yarn is None else _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(shape: Shape) -> float:
    """1/sqrt(query width), raised by YaRN's temperature, as DeepSeek applies it."""
    temperature = 1.0 if shape.yarn is None else _mscale(shape.yarn.factor, shape.yarn.mscale_all_dim) ** 2
    return shape.qk_dim**-0.5 * temperature
