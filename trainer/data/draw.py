"""Draws that belong to a document: which split it is in, whether it is sampled, where it is cut.

A generator would tie each draw to the order of the documents and to where a build was interrupted; a hash of the
document's key ties it to nothing else. Records with the same text draw the same, so no copy of a training record is
ever held out.
"""

from __future__ import annotations

import hashlib


def draw(use: str, key: bytes) -> float:
    """A number in [0, 1), always the same for a key and independent between uses (names of at most 16 bytes)."""
    digest = hashlib.blake2b(key, digest_size=8, person=use.encode()).digest()
    return (int.from_bytes(digest) >> 11) / 2**53
