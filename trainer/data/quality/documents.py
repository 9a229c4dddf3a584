"""The documents of a split one by one, and hashes of their n-grams, for the quality tools.

The tools work on tokens, not text: the tokens are memory-mapped with the place of every document, whatever format the
dataset was built from. Two texts that differ only in spacing also differ in tokens; near copies cover that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.data.dataset import SplitName
from dryvine.trainer.data.packed_tokens import PackedTokens
from dryvine.trainer.data.shards import SPLITS

_BASE, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


class DocumentPlace(NamedTuple):
    """A document: its split, and its number there from 0."""

    split: SplitName
    number: int


class Repeat(NamedTuple):
    """A document that is in the dataset already, entirely or in large part."""

    place: DocumentPlace
    tokens: int  # with its end token
    what: str  # "exact copy", "near copy" or "quoted"
    of: DocumentPlace | None  # the document that is kept; None if several together
    share: float  # Jaccard similarity of a copy; share of n-grams found elsewhere


class SplitDocuments:
    """The documents of one split by number; tokens come without the end token."""

    def __init__(self, folder: Path, split: SplitName) -> None:
        self.split, self.packed = split, PackedTokens(folder, split)
        self._bounds = np.concatenate([[0], self.packed.document_ends().astype(np.int64)])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each document, with its end token."""
        return np.diff(self._bounds)

    def tokens(self, number: int) -> NDArray[np.unsignedinteger]:
        start, end = self._bounds[number : number + 2].tolist()
        return self.packed.tokens(start, end - start - 1)

    def __iter__(self) -> Iterator[tuple[DocumentPlace, NDArray[np.unsignedinteger]]]:
        for number in range(len(self)):
            yield DocumentPlace(self.split, number), self.tokens(number)


def splits_of(folder: Path) -> dict[SplitName, SplitDocuments]:
    return {split: SplitDocuments(folder, split) for split in SPLITS}


def ngrams(tokens: NDArray[np.integer], length: int) -> NDArray[np.uint64]:
    """A hash of every run of `length` tokens: uint64 [tokens - length + 1], or [0] if there are fewer tokens."""
    count = max(0, len(tokens) - length + 1)
    hashes = np.zeros(count, np.uint64)
    for k in range(length):  # modulo 2**64, as unsigned integers are
        hashes = hashes * _BASE + (tokens[k : k + count].astype(np.uint64) + np.uint64(1)) * _SPREAD
    hashes ^= hashes >> np.uint64(32)
    hashes *= _SPREAD
    return hashes ^ (hashes >> np.uint64(29))
