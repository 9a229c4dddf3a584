"""What `dryvine checkpoint` prints: what a checkpoint holds, whether it is intact, and where two differ. Needs no
ranks.

Everything reads through `reader.CheckpointReader`, so both formats and any two layouts can be inspected and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch

from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.manifest import CheckpointError, Manifest
from dryvine.trainer.checkpoint.reader import CheckpointReader, open_checkpoint, whole

OnRead = Callable[[int], None]  # bytes read since the last call


class Listed(NamedTuple):
    """A row of `dryvine checkpoint ls`."""

    path: Path
    manifest: Manifest | None  # None if it cannot be read
    bytes: int  # on the disk
    written: datetime
    trouble: str  # why it cannot be read


class Difference(NamedTuple):
    """The difference in a parameter's field, or a buffer, between two checkpoints."""

    what: str  # "layers.3.attention.o.weight: exp_avg"
    elements: int  # that differ
    of: int
    largest: float  # absolute
    relative: float  # the norm of the difference over the norm of the first

    @property
    def alike(self) -> bool:
        return not self.elements


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints hold, and where they differ."""

    only_first: list[str]  # "w: ema"
    only_second: list[str]
    differences: list[Difference]  # of what both hold, alike or not

    @property
    def alike(self) -> bool:
        return not self.only_first and not self.only_second and all(one.alike for one in self.differences)


def list_run(folder: Path) -> list[Listed]:
    """The checkpoints of a run folder, oldest first. Reads their indexes only."""
    return [_listed(path) for path in run_folder.complete(folder)]


def damage(reader: CheckpointReader, on_read: OnRead) -> Iterator[str]:
    """Every tensor or file of a checkpoint that is not as it was written; reads all of it."""
    for name, file in reader.manifest.files.items():
        yield from reader.damage(name)
        on_read(file.bytes)


def experts(manifest: Manifest) -> dict[str, int]:
    """How many experts each stack of experts has stored; nothing for format 1, which does not record it."""
    pieces = manifest.pieces()
    return {
        name: sum(piece.elements for piece in pieces[name, "master"]) // math.prod(shape[1:])
        for name, shape in manifest.parameters.items()
        if len(shape) == 3
    }


def compare(first: CheckpointReader, second: CheckpointReader, on_read: OnRead) -> Comparison:
    """Compare everything that two checkpoints hold, of any layouts. Raises CheckpointError where a tensor has two
    shapes."""
    ours, theirs = _held(first), _held(second)
    both = [key for key in ours if key in theirs]
    differences = []
    for name, field in both:
        differences.append(_difference(first, second, name, field))
        on_read(1)
    return Comparison(
        [f"{name}: {field}" for name, field in ours if (name, field) not in theirs],
        [f"{name}: {field}" for name, field in theirs if (name, field) not in ours],
        differences,
    )


def count_fields(reader: CheckpointReader) -> int:
    """How many fields `compare` reads."""
    return len(_held(reader))


def _listed(path: Path) -> Listed:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    written = datetime.fromtimestamp(path.stat().st_mtime)
    try:
        return Listed(path, open_checkpoint(path).manifest, size, written, "")
    except CheckpointError as error:
        return Listed(path, None, size, written, str(error))


def _held(reader: CheckpointReader) -> dict[tuple[str, str], None]:
    """Everything stored, as (name, field), in the order in which it is stored."""
    return {(tensor.name, tensor.field): None for tensor in reader.manifest.tensors}


def _difference(first: CheckpointReader, second: CheckpointReader, name: str, field: str) -> Difference:
    if _same_checksums(first.manifest, second.manifest, name, field):
        return Difference(f"{name}: {field}", 0, 1, 0.0, 0.0)
    a, b = (whole(reader, name, field).flatten() for reader in (first, second))
    if a.numel() != b.numel():
        raise CheckpointError(f"{name}: {a.numel()} elements in {first.path}, {b.numel()} in {second.path}")
    a, b = a.double(), b.double()
    gap = (a - b).abs()
    norm = float(torch.linalg.vector_norm(a))
    relative = float(torch.linalg.vector_norm(gap)) / norm if norm else float(gap.max() > 0)
    return Difference(f"{name}: {field}", int((gap != 0).sum()), a.numel(), float(gap.max()), relative)


def _same_checksums(first: Manifest, second: Manifest, name: str, field: str) -> bool:
    """Whether both have the same pieces with equal checksums."""
    mine, other = (
        {(t.first, t.checksum) for t in manifest.tensors if (t.name, t.field) == (name, field)}
        for manifest in (first, second)
    )
    return mine == other and all(checksum for _, checksum in mine)
