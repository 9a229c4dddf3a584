"""A file as bytes, decompressed by its suffix (.gz, .zst) through pyarrow, which every installation has.

A compressed file cannot be entered in the middle: a resumed build decompresses it again up to its position, which takes
a hundredth of the time of tokenizing it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from dryvine.trainer.data.readers.record import is_damage

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_STEP_BYTES = 2**20


class OpenFile(NamedTuple):
    """`data` is the decompressed file, `raw` the file on disk."""

    data: io.BufferedReader
    raw: io.BufferedReader
    is_compressed: bool

    def progress(self) -> int:
        """Bytes of the file on disk that have been read."""
        return self.raw.tell() if self.is_compressed else self.data.tell()


@contextmanager
def open_by_suffix(path: Path) -> Iterator[OpenFile]:
    """Raises OSError while reading a damaged file."""
    with path.open("rb") as raw:
        codec = _CODECS.get(path.suffix.lower())
        if codec is None:
            yield OpenFile(raw, raw, False)
            return
        yield OpenFile(io.BufferedReader(_Decompressed(raw, codec), _STEP_BYTES), raw, True)


class _Decompressed(io.RawIOBase):
    """The bytes up to the damage, then its OSError. A pyarrow read that meets damage returns nothing: the file is
    then reopened and read up to the damage byte by byte."""

    def __init__(self, raw: io.BufferedReader, codec: str) -> None:
        self.path, self.codec, self.given = raw.name, codec, 0
        self.damage: OSError | None = None
        self.stream = self._decompress(raw)

    def _decompress(self, raw: io.BufferedReader) -> pa.NativeFile:
        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), self.codec)

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        if self.damage:
            raise self.damage
        try:
            part = self.stream.read(len(into))
        except OSError as error:
            if not is_damage(error):
                raise
            self.damage, part = error, self._before_damage(len(into))
            if not part:
                raise
        into[: len(part)] = part
        self.given += len(part)
        return len(part)

    def _before_damage(self, most: int) -> bytes:
        left, part = self.given, bytearray()
        with open(self.path, "rb") as raw, self._decompress(raw) as stream:
            while left:
                left -= len(stream.read(min(left, _STEP_BYTES)))
            with suppress(OSError):
                while len(part) < most:
                    part += stream.read(1)
        return bytes(part)


def decompressed_bytes(path: Path, field: str) -> int:
    """The decompressed size of a file; of a damaged one, up to the damage."""
    total = 0
    with open_by_suffix(path) as file:
        try:
            while part := file.data.read(_STEP_BYTES):
                total += len(part)
        except OSError as error:
            if not is_damage(error):
                raise
    return total
