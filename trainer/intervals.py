"""Means over a sample of questions or texts, with 95% confidence intervals for the choice of the sample.

A mean of shares has a normal interval. A share of yes and no has Wilson's, which neither leaves 0..1 nor is a point
where all or none are right. A loss per token is a ratio of two sums, and texts are drawn, not tokens: its interval is
that of a ratio of means (Cochran, Sampling Techniques, section 6.4).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.96


class Figure(NamedTuple):
    """A value and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def mean(values: Sequence[float]) -> Figure:
    """Of numbers between 0 and 1."""
    middle = statistics.fmean(values)
    half = Z * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Figure(middle, max(0.0, middle - half), min(1.0, middle + half))


def share(right: Sequence[bool]) -> Figure:
    """Of those that are right, with Wilson's interval."""
    part, spread = statistics.fmean(right), Z * Z / len(right)
    middle = (part + spread / 2) / (1 + spread)
    half = Z * math.sqrt(part * (1 - part) / len(right) + spread / (4 * len(right))) / (1 + spread)
    return Figure(part, middle - half, middle + half)


def pass_at_k(right: Sequence[int], samples: int, k: int) -> Figure:
    """Of each question, how many of `samples` answers are right -> the chance that one of k is, without bias (arXiv
    2107.03374, equation 1)."""
    if k == samples:
        return share([count > 0 for count in right])
    every = math.comb(samples, k)
    return mean([(every - math.comb(samples - count, k)) / every for count in right])


def ratio(sums: Sequence[float], sizes: Sequence[int]) -> Figure:
    """Of all sums over all sizes: a loss of texts over their tokens."""
    total, n = sum(sizes), len(sums)
    middle = sum(sums) / total
    squares = sum((part - middle * size) ** 2 for part, size in zip(sums, sizes, strict=True))
    half = Z * math.sqrt(squares * n / (n - 1)) / total if n > 1 else 0.0
    return Figure(middle, middle - half, middle + half)
