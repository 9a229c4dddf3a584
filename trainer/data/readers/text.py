"""Text files: one file is one document, however large.

A large file is read in pieces, cut where a line begins with a letter: no byte-level BPE merges tokens across such a
place, so the pieces have the same tokens as the whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from dryvine.trainer.data.readers.record import Broken, Record, reason_of

PIECE_BYTES = 2**20


def read_text(path: Path, field: str, line: int, byte: int) -> Iterator[Record]:
    """One document. A line that is not UTF-8 is left out of it."""
    with path.open("rb") as file:
        file.seek(byte)
        record = Record(line, byte, ends=False)
        while not record.ends:
            record = _read_piece(file, record.line)
            yield record


def _read_piece(file: BufferedReader, line: int) -> Record:
    starts, size = file.tell() == 0, 0
    texts: list[str] = []
    broken: list[Broken] = []
    while raw := file.readline(PIECE_BYTES):
        try:
            texts.append(_decode(file, raw))
        except UnicodeDecodeError as error:
            broken.append(Broken(line + 1, reason_of(error)))
        line, size = line + raw.endswith(b"\n"), size + len(raw)
        if _cut_here(file, size, raw.endswith(b"\n")):
            return Record(line, file.tell(), "".join(texts), tuple(broken), starts, ends=False)
    return Record(line, file.tell(), "".join(texts), tuple(broken), starts)


def _decode(file: BufferedReader, raw: bytes) -> str:
    """Decode the line just read, or as much of a very long one as ends with a whole character; the rest is put back."""
    at_start = file.tell() == len(raw)
    is_complete = raw.endswith(b"\n") or len(raw) < PIECE_BYTES
    text, used = codecs.utf_8_decode(raw, "strict", is_complete)
    file.seek(used - len(raw), 1)
    return text.removeprefix("\ufeff") if at_start else text


def _cut_here(file: BufferedReader, size: int, at_line: bool) -> bool:
    """Cut before a letter at the start of a line; text without such a place is cut at four times the piece size."""
    following = file.peek(1)[:1]
    return bool(following) and size >= PIECE_BYTES and ((at_line and following.isalpha()) or size >= 4 * PIECE_BYTES)
