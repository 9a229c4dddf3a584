"""The rows of a run folder's JSON-lines files, which `journal` writes. Imports no torch, since reports and `watch` read
them on machines without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dryvine.trainer.config import ConfigError

Figures = dict[str, Any]  # a row of metrics.jsonl: numbers, and None where a figure is not known


def read(folder: Path, name: str = "metrics.jsonl") -> list[Figures]:
    """The rows of a run folder's metrics.jsonl, in order; none if there is no such file. An incomplete last row, left
    by a run that was killed, is dropped; any other invalid row raises ConfigError."""
    path = folder / name
    rows: list[Figures] = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ConfigError(
                    f"{path}, line {number}: not a row of figures; restore the file, or delete the line"
                ) from None
    return rows
