"""The kinds of input files. A new kind is a file with a reader (its contract is in record.py) and a line in READERS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.readers.compressed import decompressed_bytes
from dryvine.trainer.data.readers.jsonl import read_jsonl
from dryvine.trainer.data.readers.parquet import column_bytes, read_parquet
from dryvine.trainer.data.readers.record import Reader
from dryvine.trainer.data.readers.text import read_text


def size_on_disk(path: Path, field: str) -> int:
    return path.stat().st_size


class FileKind(NamedTuple):
    """How files with a certain suffix are read.

    `is_document`: a file is one document, identified by its name. Otherwise documents are identified by their text.
    `text_bytes`: how much text a file holds, by its path and the field.
    """

    read: Reader
    is_document: bool
    text_bytes: Callable[[Path, str], int] = size_on_disk


READERS = {
    ".txt": FileKind(read_text, is_document=True),
    ".md": FileKind(read_text, is_document=True),
    ".py": FileKind(read_text, is_document=True),
    ".jsonl": FileKind(read_jsonl, is_document=False),
    ".jsonl.gz": FileKind(read_jsonl, is_document=False, text_bytes=decompressed_bytes),
    ".jsonl.zst": FileKind(read_jsonl, is_document=False, text_bytes=decompressed_bytes),
    ".json.gz": FileKind(read_jsonl, is_document=False, text_bytes=decompressed_bytes),  # C4's name for JSON Lines
    ".json.zst": FileKind(read_jsonl, is_document=False, text_bytes=decompressed_bytes),
    ".parquet": FileKind(read_parquet, is_document=False, text_bytes=column_bytes),
    ".arrow": FileKind(read_parquet, is_document=False, text_bytes=column_bytes),
}


def kind_of(path: Path) -> FileKind:
    """The kind of file by its suffix. Raises DataError if there is no reader for it."""
    name = path.name.lower()
    found = next((kind for suffix, kind in READERS.items() if name.endswith(suffix)), None)
    if found is None:
        raise DataError(f"{path}: no reader for {path.suffix or 'no suffix'}; known: {' '.join(READERS)}")
    return found
