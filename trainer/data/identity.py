"""The identity of a run's data, as two fingerprints: a resumed run must read the same tokens, wherever they are stored
by then."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from dryvine.trainer.data.source import TokenLine

BLOCKS, BLOCK = 256, 1024  # of tokens, spread over a split


class DataIdentity(NamedTuple):
    """Of a dataset's tokens and of its tokenizer; None if not known."""

    data: str | None
    tokenizer: str | None


UNKNOWN = DataIdentity(None, None)


def identify(splits: Iterable[TokenLine], tokenizer_sha256: str | None) -> DataIdentity:
    """Reads at most 2 MiB of each split: its length and BLOCKS blocks of tokens, evenly spread. Another text, order,
    tokenizer or split shifts tokens and so changes nearly every block; a few tokens changed in place may go unseen."""
    digest = hashlib.sha256()
    for packed in splits:
        digest.update(f"{len(packed)} ".encode())
        for start in range(0, len(packed), max(BLOCK, len(packed) // BLOCKS)):
            digest.update(packed.tokens(start, min(BLOCK, len(packed) - start)).astype("<i8").tobytes())
    return DataIdentity(digest.hexdigest(), tokenizer_sha256)
