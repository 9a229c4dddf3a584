"""Validation documents that training documents quote: the share of their n-grams that training text also has.

A model predicts text that it was trained on well, so its validation loss on quoted documents means nothing. The split
by hash keeps equal texts on one side, but misses a press release inside twenty articles; n-grams of tokens find it
(Brown et al. 2020, appendix C, uses n-grams of words). Such a document is dropped from validation: dropping everything
that quotes it would cost training text that is mostly original.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.data.dataset import SplitName
from dryvine.trainer.data.quality.copies import OnDocument
from dryvine.trainer.data.quality.documents import DocumentPlace, Repeat, SplitDocuments, ngrams


def find_quoted(
    splits: Mapping[SplitName, SplitDocuments],
    length: int,
    share: float,
    left_out: Collection[DocumentPlace],
    on_document: OnDocument,
) -> Iterator[Repeat]:
    """Validation documents of whose n-grams of `length` tokens training documents have at least that share.

    Documents in `left_out` do not count. Takes 9 bytes of memory for each token of validation, and one pass over
    training.
    """
    val, train = splits["val"], splits["train"]
    known = _all_ngrams(val, length)
    found = np.zeros(len(known), bool)
    for done, (place, tokens) in enumerate(train, 1):
        if place not in left_out:
            found[_places(known, np.unique(ngrams(tokens, length)))] = True
        on_document(done)
    for place, tokens in val:
        own = _places(known, np.unique(ngrams(tokens, length)))
        quoted = float(found[own].mean()) if own.size else 0.0
        if place not in left_out and quoted >= share:
            yield Repeat(place, len(tokens) + 1, "quoted", None, quoted)


def _all_ngrams(split: SplitDocuments, length: int) -> NDArray[np.uint64]:
    parts = [ngrams(tokens, length) for _, tokens in split]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))


def _places(known: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The positions in `known` of those hashes of `wanted` that are there; both are ascending."""
    at = np.searchsorted(known, wanted)
    inside = at < len(known)
    at, wanted = at[inside], wanted[inside]
    return at[known[at] == wanted]
