"""Loading into any layout: every rank reads the parts of stored pieces that overlap its own.

Before anything is loaded, the whole checkpoint is checked: ranks share the files out among them, compare every
checksum, and exchange the results. The price is that most bytes are read twice, the second time mostly from the page
cache.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, cast

from torch import Tensor

from dryvine.comm.mesh import Mesh
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.manifest import CheckpointError, Manifest, StoredPieces, StoredTensor, overlaps
from dryvine.trainer.checkpoint.reader import CheckpointReader, open_checkpoint
from dryvine.trainer.checkpoint.state import RunState

OnDamage = Literal["stop", "previous"]
OF_ANOTHER_MODEL = (
    "the checkpoint is of another model; set run.name to begin a new run, "
    "or go back to the [model] table in the run folder's config.toml"
)


@dataclass(frozen=True)
class Loaded:
    step: int
    missing: frozenset[str]  # the optional fields that are not stored


class NewestSound(NamedTuple):
    reader: CheckpointReader | None
    passed_over: list[str]  # why, of each damaged checkpoint that was set aside


class _Read(NamedTuple):
    """A part of a stored tensor, and its destination."""

    tensor: StoredTensor
    part: slice
    to: Tensor


def newest_sound(folder: Path, mesh: Mesh, on_damage: OnDamage) -> NewestSound:
    """The newest checkpoint of a run folder, fully verified. A damaged one raises CheckpointError, or with
    "previous" is set aside and the one before is used. Collective."""
    passed_over: list[str] = []
    while path := cast(list[Path | None], mesh.gather(run_folder.newest(folder), "the newest checkpoint"))[0]:
        try:
            return NewestSound(verified(path, mesh), passed_over)
        except CheckpointError as error:
            before = cast(list[list[Path]], mesh.gather(run_folder.complete(folder)[:-1], "checkpoints"))[0]
            if on_damage == "stop" or not before:
                raise CheckpointError(f"{error}; {_way_out(before)}") from None
            passed_over.append(str(error))
            if mesh.rank == 0:
                run_folder.set_aside(path)
                run_folder.point_to(before[-1])
            mesh.barrier("setting a damaged checkpoint aside")
    return NewestSound(None, passed_over)


def verified(path: Path, mesh: Mesh) -> CheckpointReader:
    """Open a checkpoint and compare every byte with its checksum. Raises CheckpointError, on all ranks the same.
    Collective."""
    reader, own = None, ""
    try:
        reader = open_checkpoint(path)
        names = sorted(reader.manifest.files)[mesh.rank :: mesh.size]
        own = next((wrong for name in names for wrong in reader.damage(name)), "")
    except CheckpointError as error:
        own = str(error)
    _raise_first(mesh, own)
    assert reader is not None
    return reader


def load(
    reader: CheckpointReader,
    state: RunState,
    mesh: Mesh,
    optional: Collection[str] = (),
    fix: str = OF_ANOTHER_MODEL,
) -> Loaded:
    """Fill `state` in place from a checkpoint of any layout, and of FP32 or BF16 moments. A field named in `optional`
    stays as it is if the checkpoint does not have it. Raises CheckpointError, which ends with `fix`, on all ranks
    before anything is filled. Collective."""
    missing = frozenset(optional) - {tensor.field for tensor in reader.manifest.tensors}
    reads: list[_Read] = []
    own = next(_other_shapes(reader.manifest, state), "")
    try:
        reads = [] if own else [*_piece_reads(reader.manifest, state, missing), *_buffer_reads(reader.manifest, state)]
    except CheckpointError as error:
        own = str(error)
    _raise_first(mesh, f"{reader.path}: {own}; {fix}" if own else "")
    every = cast(list[list[str]], mesh.gather(list(state.shapes), "names of parameters"))
    if extra := set(reader.manifest.parameters).difference(*every):
        raise CheckpointError(f"{reader.path}: holds {min(extra)}, which this model has not; {fix}")
    for tensor, part, to in reads:
        to.copy_(reader.read(tensor, part))
    return Loaded(reader.manifest.step, missing)


def _raise_first(mesh: Mesh, own: str) -> None:
    """Raise on all ranks the first error of any rank."""
    if wrong := next((said for said in mesh.gather(own, "what is wrong with a checkpoint") if said), None):
        raise CheckpointError(str(wrong))


def _way_out(before: list[Path]) -> str:
    if not before:
        return "there is no checkpoint before it: restore it from a copy, or delete it to begin anew"
    return f'restore it from a copy, or set run.on_damage="previous" to go on from {before[-1].name}'


def _other_shapes(manifest: Manifest, state: RunState) -> Iterator[str]:
    for name, shape in state.shapes.items():
        stored = manifest.parameters.get(name)
        if stored is None:
            yield f"does not hold {name}"
        elif stored != (shape if manifest.format > 1 else (math.prod(shape),)):
            yield f"{name} is of {list(stored)} there and {list(shape)} here"


def _piece_reads(manifest: Manifest, state: RunState, missing: Collection[str]) -> Iterator[_Read]:
    stored = manifest.pieces()
    for (name, first), fields in state.pieces.items():
        size = fields["master"].numel()
        for field, live in fields.items():
            if field not in missing:
                yield from _field_reads(stored, name, field, first, size, live)


def _field_reads(stored: StoredPieces, name: str, field: str, first: int, size: int, live: Tensor) -> Iterator[_Read]:
    """The reads that fill `live`, a field of a parameter's elements first..first+size. Raises if not all of them are
    stored."""
    found = 0
    for tensor, part in overlaps(stored, name, field, first, size):
        found += part.stop - part.start
        at = tensor.first + part.start - first
        yield _Read(tensor, part, live[at : at + part.stop - part.start] if live.dim() else live)
    if found != size:
        raise CheckpointError(f"does not hold {name}, elements {first} to {first + size}, {field}")


def _buffer_reads(manifest: Manifest, state: RunState) -> Iterator[_Read]:
    stored = manifest.buffers()
    for name, live in state.buffers.items():
        if name not in stored or stored[name].shape != tuple(live.shape):
            raise CheckpointError(f"does not hold {name} of {list(live.shape)}")
        yield _Read(stored[name], slice(None), live)
