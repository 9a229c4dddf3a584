"""What a dataset is made of, in figures: lengths of documents, use of the vocabulary, reasons for what was left out."""

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
    """Of one split. `sizes` are tokens of each document, ascending; `counts` how often each token id comes."""

    split: SplitName
    bytes: int
    sizes: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def unused(self) -> int:
        """Token ids that never come."""
        return int((self.counts == 0).sum())

    @property
    def entropy(self) -> float:
        """Nats a token would cost if tokens were drawn one by one: what a model reaches before it reads context."""
        shares = self.counts[self.counts > 0] / max(self.tokens, 1)
        return float(-(shares * np.log(shares)).sum())

    def quantile(self, share: float) -> int:
        """So many tokens has the document that is longer than this share of them."""
        return int(np.quantile(self.sizes, share, method="higher")) if self.sizes.size else 0

    def in_longer(self, length: int) -> float:
        """Share of the tokens that lie in documents of more than `length`: what a longer context could use."""
        return float(self.sizes[self.sizes > length].sum() / max(self.sizes.sum(), 1))


def figures_of(folder: Path, split: SplitName) -> SplitFigures:
    """Reads every token of the split once."""
    documents = SplitDocuments(folder, split)
    packed, dataset = documents.packed, documents.packed.dataset
    counts = np.zeros(dataset.vocab_size, np.int64)
    for start in range(0, len(packed), _STEP_TOKENS):
        tokens = packed.tokens(start, min(_STEP_TOKENS, len(packed) - start))
        counts += np.bincount(tokens, minlength=dataset.vocab_size)
    return SplitFigures(split, dataset.split(split).bytes, np.sort(documents.sizes), counts)


def quarantined_by_reason(folder: Path) -> Counter[str]:
    """Reasons up to their details, most frequent first."""
    Dataset.load(folder)
    with (folder / "quarantine.jsonl").open() as lines:
        return Counter(json.loads(line)["reason"].partition(":")[0] for line in lines)


def by_length(sizes: NDArray[np.int64]) -> dict[str, tuple[float, float]]:
    """For each range of lengths, from a power of 4 to the next: shares of the documents and of the tokens in it."""
    found, edge = {}, 1
    while sizes.size and edge <= sizes[-1]:
        inside = sizes[(sizes >= edge) & (sizes < 4 * edge)]
        found[f"{edge:,}+"] = (inside.size / sizes.size, float(inside.sum() / sizes.sum()))
        edge *= 4
    return found
