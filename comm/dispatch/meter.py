"""The bytes that this rank sends, by class of link.

There is one meter for each dispatcher, made in its `Setup` and handed to whatever sends for it: the exchanges of all
its groups, MPI, DeepEP's kernels, the rounds around it. A counter in each of them would have to be found and added up
by the caller, and one that is forgotten is missing from the metrics without a trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dryvine.comm.topology import LinkClass


class Meter:
    """Bytes sent since the last `take`. "self" is a copy within the rank, "intra" inside a node, "inter" between."""

    def __init__(self) -> None:
        self._bytes: Counter[LinkClass] = Counter()

    def add(self, links: Sequence[LinkClass], rows: Sequence[int], row_bytes: int) -> None:
        """Count `rows[i]` rows of `row_bytes` bytes over link `links[i]`."""
        for link, count in zip(links, rows, strict=True):
            self._bytes[link] += count * row_bytes

    def put(self, taken: Mapping[LinkClass, int]) -> None:
        """Count what `take` returned: what a CUDA graph sends each time that it is replayed."""
        self._bytes.update(taken)

    def take(self) -> dict[LinkClass, int]:
        """What was counted since the last call."""
        taken, self._bytes = self._bytes, Counter()
        return dict(taken)
