"""What every reader yields: records, each a piece of a document plus the broken lines met on the way to it.

A record carries the position where reading continues after it, so a build killed in the middle of a 100 GB file resumes
there. Broken lines are data, not exceptions: one bad line of a crawl must not end a build of days.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, Protocol

from dryvine.trainer.data.readers.fields import Fields

_STEP_BYTES = 2**20


class Broken(NamedTuple):
    """A line (from 1; a row in parquet) that was left out, and why."""

    line: int
    reason: str


class Record(NamedTuple):
    """Text of a document. Reading continues after `line` lines, at `byte` (in parquet an estimate, for progress).

    Lines that were broken up to there are in the same record, so no resume position ever falls between the two.
    """

    line: int
    byte: int
    text: str = ""
    broken: tuple[Broken, ...] = ()
    starts: bool = True  # this piece is the first of its document
    ends: bool = True  # and this its last


class Reader(Protocol):
    """Yields the records of a file from a position of an earlier record on; (0, 0) is its beginning.

    `fields` says which field or column holds the text, and which records are wanted: others come without text. Holds
    one record in memory at most.
    """

    def __call__(self, path: Path, fields: Fields, line: int, byte: int) -> Iterator[Record]: ...


def is_damage(error: Exception) -> bool:
    """Whether reading failed because of what the file holds. An OSError with a number is the disk's or the network's:
    it may be gone at the next try, and text must not be left out for it."""
    return not (isinstance(error, OSError) and error.errno)


def broken_record(line: int, byte: int, reason: str) -> Record:
    """A record without text, for a line or file that is left out."""
    return Record(line, byte, broken=(Broken(line, reason),))


def reason_of(error: Exception) -> str:
    """The reason that quarantine.jsonl records for a decoding error."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}, column {error.colno}"
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair, which is no text"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def other_encoding(head: bytes) -> str | None:
    """Why a file that starts with `head` is left out, if its byte order mark is not UTF-8's."""
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}  # before UTF-16: one begins with its mark
    marks |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    name = next((name for mark, name in marks.items() if head.startswith(mark)), None)
    return name and f"{name}, not UTF-8; convert it with iconv -f {name} -t UTF-8"


def skip_line(file: BufferedReader) -> None:
    """Read to the end of the line, in steps of bounded memory."""
    while (raw := file.readline(_STEP_BYTES)) and not raw.endswith(b"\n"):
        pass


def text_of(value: object, field: str) -> str:
    """The document in a decoded JSON or parquet value. Raises ValueError with the reason if it holds none."""
    if value is None:
        raise ValueError(f"{field!r} is null")
    if not isinstance(value, str):
        raise ValueError(f"{field!r} is {type(value).__name__}, not a string")
    if not value:
        raise ValueError(f"{field!r} is empty")
    if 4 * value.count("\0") > len(value):
        raise ValueError("NUL characters: UTF-16 read as bytes")
    value.encode()  # raises UnicodeEncodeError for half of a surrogate pair, which JSON can spell
    return value
