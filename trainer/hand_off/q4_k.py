"""Q4_K, the 4-bit blocks of llama.cpp, which the `gguf` library reads but does not write.

A block of 256 numbers is eight sub-blocks of 32. Each number is q * scale - low with q in 0..15, and the eight scales
and lows are 6-bit multiples of two FP16 numbers of the block: 4.5 bits a number. For each sub-block a few step sizes
are tried: a step gives the q, for which the scale and low of least squared error are solved; the best candidate is
kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK, SUB = 256, 32
TRIALS = np.linspace(-0.5, 1.0, 8, dtype=np.float32)  # added to the 15 steps that span a sub-block
CHUNK = 1 << 12  # blocks at a time: 4 MiB in FP32

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def quantize(rows: Floats) -> Bytes:
    """[R, C], C a multiple of 256 -> uint8 [R, C / 256 * 144]."""
    blocks = rows.reshape(-1, BLOCK // SUB, SUB)
    done = [_blocks(blocks[at : at + CHUNK]) for at in range(0, len(blocks), CHUNK)]
    return np.concatenate(done).reshape(len(rows), -1)


def _blocks(x: Floats) -> Bytes:
    """[B, 8, 32] -> [B, 144]."""
    scale, low = fit(x)
    d, d_low = (values.max(-1, keepdims=True) / 63 for values in (scale, low))
    d, d_low = (values.astype(np.float16) for values in (d, d_low))
    scale6, low6 = _six_bits(scale, d), _six_bits(low, d_low)
    step, offset = scale6 * d.astype(np.float32), low6 * d_low.astype(np.float32)
    q = np.clip(np.rint(_over(x + offset[..., None], step[..., None])), 0, 15).astype(np.uint8)
    # The q of two neighbouring sub-blocks share bytes.
    nibbles = q[:, 0::2] | q[:, 1::2] << 4
    parts = (d.view(np.uint8), d_low.view(np.uint8), _packed(scale6, low6), nibbles.reshape(len(x), -1))
    return np.concatenate(parts, axis=-1)


def fit(x: Floats) -> tuple[Floats, Floats]:
    """Scale and low, both at least 0, of each sub-block of 32 numbers, on the last axis."""
    bottom, top = np.minimum(x.min(-1), 0), x.max(-1)
    span = top - bottom
    best_scale, best_low = span / 15, -bottom
    best = np.full(span.shape, np.inf, np.float32)
    for trial in TRIALS:
        q = np.clip(np.rint((x - bottom[..., None]) * _over(15 + trial, span)[..., None]), 0, 15)
        scale, low = _least_squares(q, x)
        error = np.square(q * scale[..., None] - low[..., None] - x).sum(-1)
        better = error < best
        best_scale, best_low = np.where(better, scale, best_scale), np.where(better, low, best_low)
        best = np.where(better, error, best)
    return best_scale, best_low


def _least_squares(q: Floats, x: Floats) -> tuple[Floats, Floats]:
    """The scale and low that bring q * scale - low nearest to x; low at least 0."""
    sq, sqq, sx, sqx = q.sum(-1), np.square(q).sum(-1), x.sum(-1), (q * x).sum(-1)
    determinant = SUB * sqq - sq * sq
    scale, low = _over(SUB * sqx - sq * sx, determinant), _over(sq * sqx - sqq * sx, determinant)
    # With all q equal, scale and low are not determined: put everything into low if q is 0, else into scale.
    low = np.where(determinant == 0, np.where(sq == 0, -sx / SUB, 0), low)
    alone = (determinant == 0) | (low < 0)
    return np.maximum(np.where(alone, _over(sqx, sqq), scale), 0), np.maximum(low, 0)


def _six_bits(values: Floats, unit: NDArray[np.float16]) -> Bytes:
    return np.clip(np.rint(_over(values, unit.astype(np.float32))), 0, 63).astype(np.uint8)


def _packed(scale: Bytes, low: Bytes) -> Bytes:
    """Scales and lows, [B, 8] each -> [B, 12]: six bits of the first four of both; the last four are split into four
    and two bits."""
    first = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    second = low[:, :4] | (low[:, 4:] >> 4) << 6
    third = (scale[:, 4:] & 15) | (low[:, 4:] & 15) << 4
    return np.concatenate((first, second, third), axis=-1)


def _over(a: Floats | np.float32, b: Floats) -> Floats:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), b.shape), np.float32), where=b != 0)
