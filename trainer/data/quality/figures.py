"""Statistics of a dataset: lengths of documents, use of the vocabulary, and why lines were left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.data.dataset import Dataset, SplitName
from dryvine.trainer.data.quality.documents import SplitDocuments

_STEP_TOKENS = 2**24


class SplitFigures(NamedTuple):
    """One split. `sizes`: tokens of each document, ascending; `counts`: occurrences of each token id."""

    split: SplitName
    bytes: int
    sizes: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def unused(self) -> int:
        """Token ids that never occur."""
        return int((self.counts == 0).sum())

    @property
    def entropy(self) -> float:
        """Entropy of the unigram distribution, nats a token: the loss of a model that ignores context."""
        shares = self.counts[self.counts > 0] / max(self.tokens, 1)
        return float(-(shares * np.log(shares)).sum())

    def quantile(self, share: float) -> int:
        """The tokens of the document that is longer than this share of documents."""
        return int(np.quantile(self.sizes, share, method="higher")) if self.sizes.size else 0

    def in_longer(self, length: int) -> float:
        """Share of the tokens in documents of more than `length` tokens: what a longer context could use."""
        return float(self.sizes[self.sizes > length].sum() / max(self.sizes.sum(), 1))


def split_figures(folder: Path, split: SplitName) -> SplitFigures:
    """The statistics of a split; reads each of its tokens once."""
    documents = SplitDocuments(folder, split)
    packed, dataset = documents.packed, documents.packed.dataset
    counts = np.zeros(dataset.vocab_size, np.int64)
    for start in range(0, len(packed), _STEP_TOKENS):
        tokens = packed.tokens(start, min(_STEP_TOKENS, len(packed) - start))
        counts += np.bincount(tokens, minlength=dataset.vocab_size)
    return SplitFigures(split, dataset.split(split).bytes, np.sort(documents.sizes), counts)


def quarantined_by_reason(folder: Path) -> Counter[str]:
    """Reasons without their details, most frequent first, with counts."""
    Dataset.load(folder)
    with (folder / "quarantine.jsonl").open() as lines:
        return Counter(json.loads(line)["reason"].partition(":")[0] for line in lines)


def by_length(sizes: NDArray[np.int64]) -> dict[str, tuple[float, float]]:
    """For each range of lengths, from one power of 4 to the next: its shares of documents and of tokens."""
    found, edge = {}, 1
    while sizes.size and edge <= sizes[-1]:
        inside = sizes[(sizes >= edge) & (sizes < 4 * edge)]
        found[f"{edge:,}+"] = (inside.size / sizes.size, float(inside.sum() / sizes.sum()))
        edge *= 4
    return found
