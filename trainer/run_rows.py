"""The rows of a run folder's JSON-lines files. Imports no torch, since reports and `watch` read them on machines
without it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dryvine.trainer.config import ConfigError
from dryvine.trainer.data.atomic import CannotWrite

Figures = dict[str, Any]  # a row of metrics.jsonl: numbers, and None where a figure is not known


def read(folder: Path, name: str = "metrics.jsonl") -> list[Figures]:
    """The rows of a run folder's metrics.jsonl, or of another file of it, in order; none if there is no such file. NaN
    and infinities are None. An incomplete last row, left by a run that was killed, is dropped; any other invalid row
    raises ConfigError."""
    path = folder / name
    rows: list[Figures] = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise ConfigError(f"{path}, line {number}: not a row of figures; restore the file, or delete the line")
    return rows


def append(folder: Path, name: str, row: Mapping[str, object]) -> None:
    """Append a row to a file of a run folder. An incomplete last row, left by a run that was killed, is cut off first:
    in the middle of the file no reader would take it. Raises CannotWrite."""
    path = folder / name
    with CannotWrite.naming(path), path.open("a+b") as file:
        if file.seek(0, os.SEEK_END) and _last_byte(file) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _row(line: bytes) -> Figures | None:
    """None if the line is no JSON object."""
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
