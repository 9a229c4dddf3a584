"""`progress.json`: what a build has finished, and where the next run of the same build continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from dryvine.trainer.data.atomic import write_atomically
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import Split
from dryvine.trainer.data.inputs import Input
from dryvine.trainer.data.stream import StreamPosition


class BuildProgress(BaseModel, frozen=True, extra="forbid"):
    """Everything counted here is on the disk; anything else in the folder is written again."""

    fingerprint: str
    part: int = 0  # number of the next shard
    place: StreamPosition = StreamPosition()  # where reading continues
    train: Split = Split()
    val: Split = Split()
    quarantined: int = 0
    quarantine_bytes: int = 0

    def save(self, folder: Path) -> None:
        write_atomically(folder / "progress.json", self.model_dump_json())


def resume_build(folder: Path, fingerprint: str, inputs: Sequence[Input]) -> BuildProgress:
    """The progress of an interrupted build in `folder`, or a new one.

    Raises DataError if the folder is half-built from other files or settings.
    """
    path = folder / "progress.json"
    if not path.exists():
        return _start(folder, fingerprint, inputs)
    progress = BuildProgress.model_validate_json(path.read_bytes())
    if progress.fingerprint != fingerprint:
        raise DataError(f"{folder}: half-built from other files or settings; build into another folder, or delete it")
    return progress


def _start(folder: Path, fingerprint: str, inputs: Sequence[Input]) -> BuildProgress:
    progress = BuildProgress(fingerprint=fingerprint)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    listing = [{"file": str(file.path), "bytes": file.size} for file in inputs]
    write_atomically(folder / "inputs.json", json.dumps(listing, indent=0))
    progress.save(folder)
    return progress
