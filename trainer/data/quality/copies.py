"""Exact and near copies of documents, within a split and across both.

Exact copies have equal tokens. Near copies are proposed by MinHash with locality-sensitive hashing (Broder 1997;
datasketch, extra [quality]) and then compared n-gram by n-gram, so every reported pair has at least the requested
similarity, and few pairs well above it are missed. Comparing every pair would take quadratic time. Validation comes
first, so its documents are kept and the training document is reported as the copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dryvine.comm.extras import lacking
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import SplitName
from dryvine.trainer.data.quality.documents import DocumentPlace, Repeat, SplitDocuments, ngrams

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE = 5  # tokens of an n-gram; shorter documents have exact copies only
_PERMUTATIONS = 128

OnDocument = Callable[[int], None]  # documents that have been looked at


def find_copies(
    splits: Mapping[SplitName, SplitDocuments], threshold: float, on_document: OnDocument
) -> Iterator[Repeat]:
    """Documents that equal an earlier document, or share its n-grams to a Jaccard similarity of `threshold` or more.
    Takes about 4 KB of memory for each document that is not a copy. Raises DataError without datasketch."""
    seen: dict[bytes, DocumentPlace] = {}
    near = _NearIndex(splits, threshold)
    done = 0
    for split in ("val", "train"):
        for place, tokens in splits[split]:
            digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
            if (first := seen.setdefault(digest, place)) != place:
                yield Repeat(place, len(tokens) + 1, "exact copy", first, 1.0)
            elif found := near.add(place, tokens):
                yield Repeat(place, len(tokens) + 1, "near copy", *found)
            done += 1
            on_document(done)


class _NearIndex:
    def __init__(self, splits: Mapping[SplitName, SplitDocuments], threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise DataError(f"near copies: {lacking(error)}") from None
        self.splits, self.threshold = splits, threshold
        self.lsh = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        self.empty = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)

    def add(self, place: DocumentPlace, tokens: NDArray[np.integer]) -> tuple[DocumentPlace, float] | None:
        """The most similar earlier document and the similarity, if that is at least the threshold; otherwise the
        document is remembered."""
        own = _shingles(tokens)
        if not own.size:
            return None
        sketch = self._sketch(own)
        similar = [(self._similarity(own, other), other) for other in self.lsh.query(sketch)]
        best, other = max(similar, default=(0.0, place))
        if best >= self.threshold:
            return other, best
        self.lsh.insert(place, sketch, check_duplication=False)
        return None

    def _sketch(self, shingles: NDArray[np.uint64]) -> MinHash:
        sketch = self.empty.copy()
        sketch.update_batch((shingles & np.uint64(0xFFFFFFFF)).tolist())
        return sketch

    def _similarity(self, own: NDArray[np.uint64], other: DocumentPlace) -> float:
        theirs = _shingles(self.splits[other.split].tokens(other.number))
        both = np.intersect1d(own, theirs, assume_unique=True).size
        return both / (own.size + theirs.size - both)


def _shingles(tokens: NDArray[np.integer]) -> NDArray[np.uint64]:
    return np.unique(ngrams(tokens, SHINGLE))
