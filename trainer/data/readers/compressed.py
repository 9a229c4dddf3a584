"""A file as bytes, decompressed by its suffix (.gz, .zst) through pyarrow, which every installation has.

A compressed file cannot be entered in the middle: a resumed build decompresses it again up to its place, which takes a
hundredth of the time of tokenizing it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import pyarrow as pa

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_STEP_BYTES = 2**20


class OpenFile(NamedTuple):
    """`data` is the decompressed file, `raw` the file on disk."""

    data: io.BufferedReader
    raw: io.BufferedReader
    is_compressed: bool

    def progress(self) -> int:
        """Bytes on disk that have been read."""
        return self.raw.tell() if self.is_compressed else self.data.tell()


@contextmanager
def open_by_suffix(path: Path) -> Iterator[OpenFile]:
    """Raises OSError while reading a damaged file."""
    with path.open("rb") as raw:
        codec = _CODECS.get(path.suffix.lower())
        if codec is None:
            yield OpenFile(raw, raw, False)
            return
        with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec) as stream:
            yield OpenFile(io.BufferedReader(cast(io.RawIOBase, stream), _STEP_BYTES), raw, True)


def decompressed_bytes(path: Path, field: str) -> int:
    """The size of the file when decompressed; of a damaged one, up to the damage."""
    total = 0
    with open_by_suffix(path) as file:
        try:
            while part := file.data.read(_STEP_BYTES):
                total += len(part)
        except OSError:
            return total
    return total
