"""JSON Lines, plain or compressed: every line is an object with a document in one of its fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from dryvine.trainer.data.readers.compressed import OpenFile, open_by_suffix
from dryvine.trainer.data.readers.fields import Fields, dig
from dryvine.trainer.data.readers.record import (
    Record,
    broken_record,
    is_damage,
    other_encoding,
    reason_of,
    skip_line,
    text_of,
)

MAX_LINE_BYTES = 2**28  # a longer line is more likely a JSON array under the wrong name


def read_jsonl(path: Path, fields: Fields, line: int, byte: int) -> Iterator[Record]:
    """One document per line. Blank lines are ignored. A file of another encoding is left out as a whole; of a
    damaged compressed file, everything after the damage."""
    with open_by_suffix(path) as file:
        try:
            head = file.data.peek(4)[:4]
            # JSON begins with an ASCII character, of which every other encoding has a NUL in its first two bytes.
            if reason := other_encoding(head) or (b"\0" in head[:2] and "UTF-16 or UTF-32, not UTF-8") or None:
                yield broken_record(1, path.stat().st_size, reason)
                return
            _go_to(file, line, byte)
            for record in _lines(file, fields, line):
                line = record.line
                yield record
        except OSError as error:
            if not is_damage(error):
                raise
            yield broken_record(line + 1, path.stat().st_size, f"damaged from here on: {error}")


def _go_to(file: OpenFile, line: int, byte: int) -> None:
    if not file.is_compressed:
        file.data.seek(byte)
        return
    for _ in range(line):
        skip_line(file.data)


def _lines(file: OpenFile, fields: Fields, line: int) -> Iterator[Record]:
    while raw := file.data.readline(MAX_LINE_BYTES):
        line += 1
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            skip_line(file.data)
            reason = f"longer than {MAX_LINE_BYTES >> 20} MiB; is this a JSON array?"
            yield broken_record(line, file.progress(), reason)
        elif raw.strip():
            yield _record(raw, fields, line, file.progress())


def _record(raw: bytes, fields: Fields, line: int, byte: int) -> Record:
    try:
        # Only the first line of a file may begin with a byte order mark.
        return Record(line, byte, _document(raw.decode("utf-8-sig" if line == 1 else "utf-8"), fields))
    except (ValueError, RecursionError) as error:
        return broken_record(line, byte, reason_of(error))


def _document(text: str, fields: Fields) -> str:
    """The text; empty for an object that the conditions exclude."""
    value = json.loads(text.rstrip())
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return text_of(dig(value, fields.text), fields.text) if fields.wants(value) else ""
