"""Files that commands write for the user."""

from __future__ import annotations

from pathlib import Path

from dryvine.trainer.data.atomic import CannotWrite


def write_file(path: Path, text: str) -> None:
    """Write a text file, and the folders above it. Raises CannotWrite."""
    with CannotWrite.naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
