"""Input files as records: pieces of documents, and broken lines with the reason why.

Every record says where the next one starts, so that a build killed in the middle of a 100 GB file goes on from there.
A reader holds one record at most; a text file, which is one document however large, comes in pieces cut where a line
begins with a letter, since no byte-level BPE merges across such a place. A new kind of file is one function and one
line in READERS.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dryvine.trainer.data.config import DataError

PIECE = 2**20  # bytes of a text file that are one piece
LONGEST = 2**28  # bytes of a JSON line; a longer one is more likely a JSON array under the wrong name


class Broken(NamedTuple):
    line: int  # from 1; rows in parquet
    reason: str


class Record(NamedTuple):
    """Reading goes on after `line` lines, at `byte` (an estimate, for progress, in parquet).

    What was broken up to there travels in the same record, so that a place to resume from is never between the two.
    """

    line: int
    byte: int
    text: str = ""
    broken: tuple[Broken, ...] = ()
    starts: bool = True  # the document starts, or ends, with this piece
    ends: bool = True


Reader = Callable[[Path, str, int, int], Iterator[Record]]


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}, column {error.colno}"
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair, which is no text"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _text_of(value: object, field: str) -> str:
    """The document in a value that JSON or parquet gave. Raises ValueError with the reason if there is none."""
    if value is None:
        raise ValueError(f"{field!r} is null")
    if not isinstance(value, str):
        raise ValueError(f"{field!r} is {type(value).__name__}, not a string")
    if not value:
        raise ValueError(f"{field!r} is empty")
    value.encode()  # JSON may spell half of a surrogate pair
    return value


def _decode(file: BufferedReader, raw: bytes, at_start: bool) -> str:
    """UTF-8 of a line, or of as much of a very long one as ends with a whole character; the rest is put back."""
    whole = raw.endswith(b"\n") or len(raw) < PIECE
    text, used = codecs.utf_8_decode(raw, "strict", whole)
    file.seek(used - len(raw), 1)
    return text.removeprefix("\ufeff") if at_start else text


def _cut_here(file: BufferedReader, size: int, at_line: bool) -> bool:
    """Cut before a letter at the start of a line; text with no such place is cut at four times the size."""
    following = file.peek(1)[:1]
    return bool(following) and size >= PIECE and ((at_line and following.isalpha()) or size >= 4 * PIECE)


def read_text(path: Path, field: str, line: int, byte: int) -> Iterator[Record]:
    """One document. A line that is not UTF-8 is left out of it."""
    with path.open("rb") as file:
        file.seek(byte)
        starts, size = byte == 0, 0
        held: list[str] = []
        broken: list[Broken] = []
        while raw := file.readline(PIECE):
            try:
                held.append(_decode(file, raw, file.tell() == len(raw)))
            except UnicodeDecodeError as error:
                broken.append(Broken(line + 1, _reason(error)))
            line, size = line + raw.endswith(b"\n"), size + len(raw)
            if _cut_here(file, size, raw.endswith(b"\n")):
                yield Record(line, file.tell(), "".join(held), tuple(broken), starts, ends=False)
                starts, held, broken, size = False, [], [], 0
        yield Record(line, file.tell(), "".join(held), tuple(broken), starts)


def _broken(line: int, byte: int, reason: str) -> Record:
    return Record(line, byte, broken=(Broken(line, reason),))


def read_jsonl(path: Path, field: str, line: int, byte: int) -> Iterator[Record]:
    """A document a line, in its `field`. Blank lines are passed over."""
    with path.open("rb") as file:
        file.seek(byte)
        while raw := file.readline(LONGEST):
            line += 1
            yield from _json_record(file, raw, field, line)


def _json_record(file: BufferedReader, raw: bytes, field: str, line: int) -> Iterator[Record]:
    if len(raw) == LONGEST and not raw.endswith(b"\n"):
        while (rest := file.readline(PIECE)) and not rest.endswith(b"\n"):
            pass
        yield _broken(line, file.tell(), f"longer than {LONGEST >> 20} MiB; is this a JSON array?")
    elif raw.strip():
        try:
            value = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip())
            if not isinstance(value, dict):
                raise ValueError(f"a JSON {type(value).__name__}, not an object")
            if field not in value:
                raise ValueError(f"no field {field!r}")
            yield Record(line, file.tell(), _text_of(value[field], field))
        except (ValueError, RecursionError) as error:
            yield _broken(line, file.tell(), _reason(error))


def read_parquet(path: Path, field: str, line: int, byte: int) -> Iterator[Record]:
    """A document a row, in the column `field`. A damaged file gives the rows before the damage, and is then left."""
    size = path.stat().st_size
    with path.open("rb") as source:
        try:
            file = pq.ParquetFile(source)
            if field not in file.schema_arrow.names:
                raise ValueError(f"no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
            for row, cell in _cells(file, field, line):
                line = row
                yield _row(cell, field, line, size * line // file.metadata.num_rows)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield _broken(line, size, str(error))


def _cells(file: pq.ParquetFile, field: str, skip: int) -> Iterator[tuple[int, pa.Scalar]]:
    """Rows after the first `skip`, counted from 1; whole row groups before them are not read."""
    row = 0
    for group in range(file.num_row_groups):
        if row + (rows := file.metadata.row_group(group).num_rows) <= skip:
            row += rows
            continue
        for batch in file.iter_batches(1024, row_groups=[group], columns=[field]):
            for cell in batch.column(0):
                row += 1
                if row > skip:
                    yield row, cell


def _row(cell: pa.Scalar, field: str, line: int, byte: int) -> Record:
    try:
        return Record(line, byte, _text_of(cell.as_py(), field))
    except ValueError as error:
        return _broken(line, byte, _reason(error))


class Kind(NamedTuple):
    read: Reader
    whole: bool  # a file is one document, known by its name; else a document is known by its text


READERS = {
    ".txt": Kind(read_text, whole=True),
    ".md": Kind(read_text, whole=True),
    ".py": Kind(read_text, whole=True),
    ".jsonl": Kind(read_jsonl, whole=False),
    ".parquet": Kind(read_parquet, whole=False),
}


def kind_of(path: Path) -> Kind:
    """Raises DataError for a kind of file that cannot be read."""
    try:
        return READERS[path.suffix.lower()]
    except KeyError:
        raise DataError(f"{path}: no reader for {path.suffix or 'no suffix'}; known: {' '.join(READERS)}") from None
