"""JSON Lines: every line is an object with a document in one of its fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from dryvine.trainer.data.readers.record import Record, broken_record, other_encoding, reason_of, skip_line, text_of

MAX_LINE_BYTES = 2**28  # a longer line is more likely a JSON array under the wrong name


def read_jsonl(path: Path, field: str, line: int, byte: int) -> Iterator[Record]:
    """One document per line. Blank lines are ignored; a file of another encoding is left out as a whole."""
    with path.open("rb") as file:
        head = file.read(4)
        # JSON begins with an ASCII character, of which every other encoding has a NUL in its first two bytes.
        if reason := other_encoding(head) or (b"\0" in head[:2] and "UTF-16 or UTF-32, not UTF-8") or None:
            yield broken_record(1, path.stat().st_size, reason)
            return
        file.seek(byte)
        while raw := file.readline(MAX_LINE_BYTES):
            line += 1
            if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                skip_line(file)
                reason = f"longer than {MAX_LINE_BYTES >> 20} MiB; is this a JSON array?"
                yield broken_record(line, file.tell(), reason)
            elif raw.strip():
                yield _record(raw, field, line, file.tell())


def _record(raw: bytes, field: str, line: int, byte: int) -> Record:
    try:
        # Only the first line of a file may begin with a byte order mark.
        return Record(line, byte, _document(raw.decode("utf-8-sig" if line == 1 else "utf-8"), field))
    except (ValueError, RecursionError) as error:
        return broken_record(line, byte, reason_of(error))


def _document(text: str, field: str) -> str:
    value = json.loads(text.rstrip())
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    if field not in value:
        raise ValueError(f"no field {field!r}")
    return text_of(value[field], field)
