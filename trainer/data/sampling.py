"""Random decisions about a document: which split it is in, whether it is sampled, where it is cut.

A random generator would tie each decision to the order of the documents and to where a build was interrupted; a hash of
the document's key depends on nothing else. Records with the same text have the same key, so no copy of a training
record is ever held out.
"""

from __future__ import annotations

import hashlib


def uniform(purpose: str, key: bytes) -> float:
    """A number in [0, 1), the same for equal keys and independent between purposes (names of at most 16 bytes)."""
    digest = hashlib.blake2b(key, digest_size=8, person=purpose.encode()).digest()
    return (int.from_bytes(digest) >> 11) / 2**53
