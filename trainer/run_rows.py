"""The rows of a run folder's JSON-lines files. Imports no torch, since reports and `watch` read them on machines
without it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dryvine.trainer.config import ConfigError
from dryvine.trainer.data.atomic import CannotWrite

Figures = dict[str, Any]  # a row of metrics.jsonl: numbers, and None where a figure is not known

FINITE = frozenset({"loss", "grad_norm", "entropy", "mismatch_k3"})  # known for every step: None was not finite


def read(folder: Path, name: str = "metrics.jsonl") -> list[Figures]:
    """The rows of a run folder's metrics.jsonl, or of another file of it, in order; none if there is no such file. NaN
    and infinities are None. An incomplete last row without a newline, left by a run that was killed, is dropped; any
    other invalid row raises ConfigError."""
    path = folder / name
    rows: list[Figures] = []
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            raise ConfigError(f"{path}, line {number}: not a row of figures; restore the file, or delete the line")
        rows.append(row)
    unended = _row(last)
    return rows if unended is None else [*rows, unended]


def not_finite(row: Figures, name: str) -> bool:
    """Whether a figure that its step has was NaN or infinite."""
    return name in FINITE and name in row and row[name] is None


def append(folder: Path, name: str, row: Mapping[str, object]) -> None:
    """Append a row to a file of a run folder as `append_lines` does. Raises CannotWrite."""
    append_lines(folder / name, [json.dumps(row)])


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append rows, each the text of a JSON object; without any, a file that is not there is begun. An incomplete last
    row, left by a run that was killed, is cut off first, since in the middle of the file no reader would take it; a
    whole one that lacks its newline gets it. Raises CannotWrite."""
    with CannotWrite.naming(path), path.open("a+b") as file:
        if file.seek(0, os.SEEK_END) and _last_byte(file) != b"\n":
            file.seek(0)
            content = file.read()
            begin = content.rfind(b"\n") + 1
            if _row(content[begin:]) is None:
                file.truncate(begin)
            else:
                file.write(b"\n")
        file.writelines(line.encode() + b"\n" for line in lines)


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
