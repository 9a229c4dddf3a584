"""Reads a split of a dataset as one line of tokens, over memory-mapped shards."""

from __future__ import annotations

import bisect
import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import Dataset, Shard, SplitName


class PackedTokens:
    """The tokens of one split, from 0 to `len`. Raises DataError for a shard of another size than dataset.json has."""

    def __init__(self, folder: Path, split: SplitName) -> None:
        self.dataset = Dataset.load(folder)
        self.folder, self.shards = folder / split, self.dataset.split(split).shards
        self._maps = [self._map(shard) for shard in self.shards]
        self._end_maps: dict[int, NDArray[np.uint64]] = {}
        self._starts = [0, *itertools.accumulate(shard.tokens for shard in self.shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _map(self, shard: Shard) -> NDArray[np.unsignedinteger]:
        path, dtype = shard.bin(self.folder), np.dtype(self.dataset.dtype)
        size, expected = path.stat().st_size if path.exists() else 0, shard.tokens * dtype.itemsize
        if size != expected:
            raise DataError(f"{path}: {size} bytes where dataset.json says {expected}; copy or build it again")
        return np.memmap(path, dtype, mode="r")

    def tokens(self, start: int, length: int) -> NDArray[np.unsignedinteger]:
        """`length` tokens from `start`, [length], in the stored dtype: a view within a shard, a copy across shards.

        Raises IndexError outside of [0, len].
        """
        if start < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        parts, shard = [], bisect.bisect_right(self._starts, start) - 1
        while length > 0:
            offset = start - self._starts[shard]
            parts.append(self._maps[shard][offset : offset + length])
            start, length, shard = start + parts[-1].size, length - parts[-1].size, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, self.dataset.dtype)])

    def ends_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where documents end after `start` and before `stop`, in the split: int64, ascending. Reads no more than the
        ends that it returns and a few pages to find them."""
        first, last = (bisect.bisect_right(self._starts, place) - 1 for place in (start, stop - 1))
        found = []
        for shard in range(first, last + 1):
            ends, begin = self._ends(shard), self._starts[shard]
            low, high = np.searchsorted(ends, (max(start - begin, 0), stop - begin - 1), side="right")
            found.append(ends[low:high].astype(np.int64) + begin)
        return np.concatenate(found)

    def _ends(self, shard: int) -> NDArray[np.uint64]:
        if shard not in self._end_maps:
            self._end_maps[shard] = np.load(self.shards[shard].ends(self.folder), mmap_mode="r")
        return self._end_maps[shard]

    def document_ends(self) -> NDArray[np.uint64]:
        """Where each document ends in the split, after its end token: uint64 [documents], ascending."""
        shards = zip(self.shards, self._starts[:-1], strict=True)
        ends = [np.load(shard.ends(self.folder)) + np.uint64(start) for shard, start in shards]
        return np.concatenate([np.empty(0, np.uint64), *ends])
