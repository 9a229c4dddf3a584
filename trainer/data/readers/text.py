"""Text files: one file is one document, however large.

A large file is read in pieces, cut where a line begins with a letter: no byte-level BPE merges tokens across such a
place, so the pieces have the same tokens as the whole. A line that is not UTF-8 is left out as a whole: one longer than
a piece is checked to its end before any of it is kept, which costs reading it twice and no memory.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from dryvine.trainer.data.readers.fields import Fields
from dryvine.trainer.data.readers.record import (
    Broken,
    Record,
    broken_record,
    other_encoding,
    reason_of,
    skip_line,
)

PIECE_BYTES = 2**20
_HEAD_BYTES = 8000  # a NUL in these means "binary" to git, too
_NUL_FILE = "NUL bytes: UTF-16 without its mark, or not text"


def read_text(path: Path, fields: Fields, line: int, byte: int) -> Iterator[Record]:
    """One document. A line that is not UTF-8 is left out of it; a file of another encoding, as a whole."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if reason := other_encoding(head) or (_NUL_FILE if b"\0" in head else None):
            yield broken_record(1, path.stat().st_size, reason)
            return
        file.seek(byte)
        record = Record(line, byte, ends=False)
        while not record.ends:
            record = _read_piece(file, record.line)
            yield record


def _read_piece(file: BufferedReader, line: int) -> Record:
    starts, at_line, size = file.tell() == 0, _is_at_line(file), 0
    texts: list[str] = []
    broken: list[Broken] = []
    while raw := file.readline(PIECE_BYTES):
        try:
            if at_line and _is_cut(raw):
                _check_long_line(file, raw)
            texts.append(_decode(file, raw))
            at_line = raw.endswith(b"\n")
        except ValueError as error:
            broken.append(Broken(line + 1, reason_of(error)))
            at_line = True
        line, size = line + at_line, size + len(raw)
        if _cut_here(file, size, at_line):
            return Record(line, file.tell(), "".join(texts), tuple(broken), starts, ends=False)
    return Record(line, file.tell(), "".join(texts), tuple(broken), starts)


def _is_at_line(file: BufferedReader) -> bool:
    """Whether a line starts here; after a resume, by the byte before."""
    if file.tell() == 0:
        return True
    file.seek(-1, 1)
    return file.read(1) == b"\n"


def _is_cut(raw: bytes) -> bool:
    """Whether the line was longer than a piece, so that only its first part was read."""
    return len(raw) == PIECE_BYTES and not raw.endswith(b"\n")


def _check_long_line(file: BufferedReader, raw: bytes) -> None:
    """Read the rest of a line that begins with `raw`, and put it back. Raises ValueError behind the line if broken."""
    start, decoder = file.tell(), codecs.getincrementaldecoder("utf-8")()
    try:
        while raw:
            decoder.decode(_without_nul(raw))
            raw = file.readline(PIECE_BYTES) if _is_cut(raw) else b""
        decoder.decode(b"", final=True)
    except ValueError:
        if _is_cut(raw):
            skip_line(file)
        raise
    file.seek(start)


def _without_nul(raw: bytes) -> bytes:
    if b"\0" in raw:
        raise ValueError("NUL bytes, which no text has")
    return raw


def _decode(file: BufferedReader, raw: bytes) -> str:
    """Decode the line just read, or as much of a very long one as ends with a whole character; the rest is put back."""
    at_start = file.tell() == len(raw)
    text, used = codecs.utf_8_decode(_without_nul(raw), "strict", not _is_cut(raw))
    file.seek(used - len(raw), 1)
    return text.removeprefix("\ufeff") if at_start else text


def _cut_here(file: BufferedReader, size: int, at_line: bool) -> bool:
    """Cut before a letter at the start of a line; text without such a place is cut at four times the piece size."""
    following = file.peek(1)[:1]
    return bool(following) and size >= PIECE_BYTES and ((at_line and following.isalpha()) or size >= 4 * PIECE_BYTES)
