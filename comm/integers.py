"""Integer division rounded up: how many blocks of a size cover a length. Every room counts blocks, so it is in comm."""

from __future__ import annotations


def ceil_div(n: int, size: int) -> int:
    """The least q with q * size >= n, for size > 0."""
    return -(-n // size)


def round_up(n: int, size: int) -> int:
    """The least multiple of `size` that is at least n."""
    return ceil_div(n, size) * size


def power_of_two(n: int) -> int:
    """The least power of two that is at least n, for n > 0."""
    return 1 << (n - 1).bit_length()
