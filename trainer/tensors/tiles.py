"""The numbers of FP8 tiles and formats, without torch: planning counts bytes with them where torch is missing."""

from __future__ import annotations

from typing import Literal

from dryvine.comm.integers import ceil_div

# Elements that share a scale: 1 x 128 of activations, 128 x 128 of weights (arXiv 2412.19437, section 3.3.2).
TILE = 128
E4M3_MAX = 448.0
E5M6_MAX = 65024.0  # (2 - 2^-6) * 2^15: FP16's range with six bits of mantissa
# The least amax of a tile. Smaller tiles lose precision; without it, zeros would be divided by zero.
AMAX_FLOOR = 1e-4
ScaleFormat = Literal["fp32", "ue8m0"]  # ue8m0: rounded up to a power of two


def blocks(size: int) -> int:
    """How many tiles cover `size` elements."""
    return ceil_div(size, TILE)
