"""Reading a checkpoint, of either format: `open_checkpoint` is the one way in, for training, export and the commands.

A reader names what is stored (`manifest`) and reads parts of it; whole parameters are put together from the pieces that
ranks have stored, whatever the layout was. Nothing here needs other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dryvine.trainer.checkpoint import files, legacy
from dryvine.trainer.checkpoint.legacy import LegacyReader
from dryvine.trainer.checkpoint.manifest import NAME, CheckpointError, Manifest, StoredTensor, read_manifest
from dryvine.trainer.checkpoint.run_folder import newest


class CheckpointReader(Protocol):
    """An open checkpoint. All methods raise CheckpointError with the file's name."""

    @property
    def path(self) -> Path:
        """Its folder."""

    @property
    def manifest(self) -> Manifest:
        """What it holds."""

    def read(self, tensor: StoredTensor, part: slice) -> Tensor:
        """A slice of a stored tensor, on the CPU; of one without dimensions, all of it."""

    def damage(self, file: str) -> Iterator[str]:
        """What is wrong with one of `manifest.files`, by reading all of it: a line per tensor, with the file's name."""


@dataclass(frozen=True)
class SafetensorsReader:
    """A checkpoint of format 2."""

    path: Path

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.path)

    def read(self, tensor: StoredTensor, part: slice) -> Tensor:
        return files.read_part(self.path, tensor, part)

    def damage(self, file: str) -> Iterator[str]:
        return files.damage(self.path, self.manifest, file)


def open_checkpoint(path: Path) -> CheckpointReader:
    """The checkpoint in a folder, or the newest of a run folder. Reads no more than its index. Raises
    CheckpointError."""
    reader = _reader(path)
    if gap := next(reader.manifest.gaps(), None):
        raise CheckpointError(f"{path}: damaged: {gap}")
    return reader


def whole(reader: CheckpointReader, name: str, field: str = "master") -> Tensor:
    """A parameter in its whole shape (format 1: flat), all experts in, from its stored pieces; or a buffer. FP32 master
    weights by default; `field` "ema" is their average. Raises CheckpointError if it is not stored."""
    if name in (buffers := reader.manifest.buffers()):
        return reader.read(buffers[name], slice(None))
    pieces = reader.manifest.pieces().get((name, field))
    if pieces is None:
        raise CheckpointError(f"{reader.path}: has no {field} of {name}")
    if not pieces[0].shape:  # one value for each piece, the same for all
        return reader.read(pieces[0], slice(None))
    shape = reader.manifest.parameters[name]
    flat = torch.empty(math.prod(shape), dtype=getattr(torch, pieces[0].dtype))
    for piece in pieces:
        flat[piece.first : piece.first + piece.elements] = reader.read(piece, slice(None))
    return flat.view(shape)


def _reader(path: Path) -> CheckpointReader:
    if (path / "checkpoints").is_dir():
        found = newest(path)
        if found is None:
            raise CheckpointError(f"{path}: this run has no checkpoint yet")
        path = found
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a run folder or one of its checkpoints")
    if (path / legacy.INDEX).exists() or ((path / legacy.STATE).exists() and not (path / NAME).exists()):
        return LegacyReader(path)
    if not (path / NAME).exists() and not any(path.glob("rank-*")):
        exported = (path / "config.json").exists()  # or downloaded
        fix = "`dryvine import` makes one of it" if exported else "name a run folder or one of its checkpoints"
        raise CheckpointError(f"{path}: no checkpoint here; {fix}")
    return SafetensorsReader(path)
