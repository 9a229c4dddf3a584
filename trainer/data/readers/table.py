"""The kinds of input files. A new kind is a file with a reader (its contract is in record.py) and a line in READERS."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.readers.jsonl import read_jsonl
from dryvine.trainer.data.readers.parquet import read_parquet
from dryvine.trainer.data.readers.record import Reader
from dryvine.trainer.data.readers.text import read_text


class FileKind(NamedTuple):
    """How files with a certain suffix are read.

    `is_document`: a file is one document, identified by its name. Otherwise documents are identified by their text.
    """

    read: Reader
    is_document: bool


READERS = {
    ".txt": FileKind(read_text, is_document=True),
    ".md": FileKind(read_text, is_document=True),
    ".py": FileKind(read_text, is_document=True),
    ".jsonl": FileKind(read_jsonl, is_document=False),
    ".parquet": FileKind(read_parquet, is_document=False),
}


def kind_of(path: Path) -> FileKind:
    """The kind of file by its suffix. Raises DataError if there is no reader for it."""
    try:
        return READERS[path.suffix.lower()]
    except KeyError:
        raise DataError(f"{path}: no reader for {path.suffix or 'no suffix'}; known: {' '.join(READERS)}") from None
