"""The state in a checkpoint by name and element, read and written a slice at a time, without a rig.

`load` fills the pieces of one rank of a run. Export and import have no ranks, and a model that may be larger than
memory: they read ranges of elements of one parameter, or write one piece after the other.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.files import Place, write_file, write_manifest
from dryvine.trainer.checkpoint.manifest import BUFFER, CheckpointError, Manifest, Size, StoredPieces, overlaps
from dryvine.trainer.checkpoint.reader import open_checkpoint
from dryvine.trainer.checkpoint.state import COUNTS, Fields

Piece = tuple[str, int, Fields]  # (parameter, first element, fields)
FILE_BYTES = 1 << 27  # of tensors in memory until a file of them is written


class Stored:
    """What a checkpoint holds, whatever layout saved it. `path`: its folder, or a run folder for the newest. Raises
    CheckpointError."""

    def __init__(self, path: Path) -> None:
        self._reader = open_checkpoint(path)
        self.path, self.step = self._reader.path, self._reader.manifest.step

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many elements each parameter has."""
        return {name: math.prod(shape) for name, shape in self._reader.manifest.parameters.items()}

    @cached_property
    def fields(self) -> frozenset[str]:
        """ "master", and what the optimizer stored beside it."""
        return frozenset(field for _, field in self._pieces)

    @cached_property
    def buffers(self) -> dict[str, Tensor]:
        """Of the model: what a loop counts is stored as buffers too."""
        stored = self._reader.manifest.buffers()
        return {
            name: self._reader.read(tensor, slice(None))
            for name, tensor in stored.items()
            if not name.startswith(COUNTS)
        }

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self._reader.manifest.files.values())

    def damage(self) -> Iterator[tuple[int, str | None]]:
        """File by file: its bytes, and what is wrong with it if anything is. Reads all of the checkpoint."""
        for name, file in self._reader.manifest.files.items():
            yield file.bytes, next(self._reader.damage(name), None)

    def read(self, name: str, first: int, count: int, field: str = "master") -> Tensor:
        """Elements first..first+count of a parameter, flat, in the stored dtype; a field that holds for whole pieces
        is a scalar. Raises CheckpointError if they are not all there."""
        parts, found = [], 0
        for stored, part in overlaps(self._pieces, name, field, first, count):
            if not stored.shape:
                return self._reader.read(stored, slice(None))
            parts.append(self._reader.read(stored, part))
            found += part.stop - part.start
        if found != count:
            raise CheckpointError(f"{self.path}: does not hold {field} of {name}, elements {first} to {first + count}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @cached_property
    def _pieces(self) -> StoredPieces:
        return self._reader.manifest.pieces()


def write_pieces(
    folder: Path, step: int, pieces: Iterable[Piece], buffers: Mapping[str, Tensor], shapes: Mapping[str, Size]
) -> Path:
    """Write checkpoint `step` of a run folder from pieces that are made one at a time; `shapes` are the whole shapes of
    the parameters. Of one process; not a collective. Raises OSError, and CheckpointError if elements are missing."""
    path = run_folder.named(folder, step, ".part")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        written = [
            write_file(path / f"part-{number:05d}.safetensors", tensors)
            for number, tensors in enumerate(_by_file(pieces, buffers))
        ]
        manifest = Manifest(
            step=step,
            parameters=dict(shapes),
            files={one.name: one.file for one in written},
            tensors=tuple(tensor for one in written for tensor in one.tensors),
        )
        if gap := next(manifest.gaps(), None):
            raise CheckpointError(f"{path}: {gap}")
        write_manifest(path, manifest)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return run_folder.publish_step(folder, step)


def _by_file(pieces: Iterable[Piece], buffers: Mapping[str, Tensor]) -> Iterator[dict[Place, Tensor]]:
    """What goes into each file: pieces up to a size, the buffers with the first of them."""
    tensors = {Place(name, 0, BUFFER): tensor for name, tensor in buffers.items()}
    held = 0
    for name, first, fields in pieces:
        tensors |= {Place(name, first, field): tensor for field, tensor in fields.items()}
        held += sum(tensor.nbytes for tensor in fields.values())
        if held >= FILE_BYTES:
            yield tensors
            tensors, held = {}, 0
    if tensors:
        yield tensors
