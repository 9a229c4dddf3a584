"""What every reader yields: records, each a piece of a document plus the broken lines met on the way to it.

A record carries the position where reading continues after it, so a build killed in the middle of a 100 GB file resumes
there. Broken lines are data, not exceptions: one bad line of a crawl must not end a build of days.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol


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

    `field` names the field or column that holds the text. Holds one record in memory at most.
    """

    def __call__(self, path: Path, field: str, line: int, byte: int) -> Iterator[Record]: ...


def broken_record(line: int, byte: int, reason: str) -> Record:
    """A record without text, for a line or file that was left out."""
    return Record(line, byte, broken=(Broken(line, reason),))


def reason_of(error: Exception) -> str:
    """The reason that quarantine.jsonl gives for a decoding error."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}, column {error.colno}"
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair, which is no text"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def text_of(value: object, field: str) -> str:
    """The document in a decoded JSON or parquet value. Raises ValueError with the reason if it holds none."""
    if value is None:
        raise ValueError(f"{field!r} is null")
    if not isinstance(value, str):
        raise ValueError(f"{field!r} is {type(value).__name__}, not a string")
    if not value:
        raise ValueError(f"{field!r} is empty")
    value.encode()  # raises UnicodeEncodeError for half of a surrogate pair, which JSON can spell
    return value
