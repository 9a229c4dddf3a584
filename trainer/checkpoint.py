"""Checkpoints that know elements of parameters, not ranks: saved in one layout, loaded in any.

Every piece of optimizer state is stored under `parameter@first element/field`, as its owner has it. A rank that loads
asks for what its own pieces overlap, so another pp, ep, dp or schedule reads the same files. torch's distributed
checkpoint does the writing, in parallel and by rank; the weights themselves are not stored, since they are their FP32
masters rounded. A folder gets its name only when it is complete, so a run that dies while saving still has the one
before.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dryvine.comm.mesh import Mesh

Fields = Mapping[str, Tensor]  # "master", "exp_avg", ...; a field of no dimension holds for the whole piece
Pieces = Mapping[tuple[str, int], Fields]  # (parameter, first element) -> the piece's fields
Stored = dict[str, list[tuple[int, int]]]  # parameter -> (first element, length) of each stored piece
STATE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not have what this run needs."""


@dataclass(frozen=True)
class Loaded:
    step: int
    missing: frozenset[str]  # the optional fields that are not stored


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    return max(_complete(folder), default=None)


def save(folder: Path, step: int, pieces: Pieces, buffers: Mapping[str, Tensor], keep: int, mesh: Mesh) -> Path:
    """Write checkpoint `step` of a run folder and delete all but the newest `keep`. Collective.

    `buffers` are the same on all ranks that hold them; each is stored once.
    """
    target = folder / "checkpoints" / f"step-{step:08d}"
    part = target.with_suffix(".part")
    if mesh.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    # No rank writes into a folder that rank 0 is about to clear.
    mesh.barrier(f"making the folder of checkpoint {step}")
    state = {f"{name}@{start}/{field}": t for (name, start), fields in pieces.items() for field, t in fields.items()}
    state |= _buffer_keys(buffers)
    with _quiet_when_alone():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(part), no_dist=mesh.size == 1)
    if mesh.rank == 0:
        (part / STATE).write_text(json.dumps({"step": step}) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in sorted(_complete(folder))[:-keep]:
            shutil.rmtree(old)
    # No rank returns a folder that does not have its name yet.
    mesh.barrier(f"completing checkpoint {step}")
    return target


def load(
    path: Path, pieces: Pieces, buffers: Mapping[str, Tensor], mesh: Mesh, optional: Collection[str] = ()
) -> Loaded:
    """Fill `pieces` and `buffers` in place from a checkpoint of any layout, and of FP32 or BF16 moments. A field named
    in `optional` stays as it is if the checkpoint does not have it. Raises CheckpointError. Collective."""
    reader = dcp.FileSystemReader(path)
    sizes = {key: meta.size for key, meta in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    missing = frozenset(optional) - {key.rpartition("/")[2] for key in sizes}
    needed = {place: {f: t for f, t in fields.items() if f not in missing} for place, fields in pieces.items()}
    reads, copies = _reads(path, _stored(sizes), needed)
    with _quiet_when_alone():
        dcp.load(reads | _buffer_keys(buffers), storage_reader=reader, no_dist=mesh.size == 1)
    for live, read in copies:
        live.copy_(read)
    return Loaded(int(json.loads((path / STATE).read_text())["step"]), missing)


def _complete(folder: Path) -> Iterator[Path]:
    return (path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".part")


def _buffer_keys(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"buffer/{name}": tensor for name, tensor in buffers.items()}


def _stored(sizes: Mapping[str, torch.Size]) -> Stored:
    """The pieces in a checkpoint, from its keys."""
    stored: Stored = {}
    for key, size in sizes.items():
        if key.endswith("/master"):
            name, start = key.removesuffix("/master").rsplit("@", 1)
            stored.setdefault(name, []).append((int(start), size.numel()))
    return stored


def _reads(path: Path, stored: Stored, pieces: Pieces) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """The tensor to read each key into, and the (to, from) copies to make afterwards. A stored piece that is exactly
    one of ours is read in place; any other is read whole, and the part that we own is copied."""
    reads: dict[str, Tensor] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    for (name, start), fields in pieces.items():
        size = fields["master"].numel()
        for begin, length in _covering(path, stored, name, start, size):
            low, high = max(begin, start), min(begin + length, start + size)
            for field, live in fields.items():
                key = f"{name}@{begin}/{field}"
                if (begin, length) == (start, size):
                    reads[key] = live
                    continue
                # Several pieces of ours may lie in one stored piece, which is then read once.
                if key not in reads:
                    shape = () if live.dim() == 0 else (length,)
                    reads[key] = torch.empty(shape, dtype=live.dtype, device=live.device)
                to, source = slice(low - start, high - start), slice(low - begin, high - begin)
                copies.append((live, reads[key]) if live.dim() == 0 else (live[to], reads[key][source]))
    return reads, copies


def _covering(path: Path, stored: Stored, name: str, start: int, size: int) -> list[tuple[int, int]]:
    """The stored pieces that overlap elements start..start+size of a parameter; together they must hold them all."""
    overlapping = [(b, n) for b, n in stored.get(name, []) if b < start + size and start < b + n]
    if sum(min(b + n, start + size) - max(b, start) for b, n in overlapping) != size:
        raise CheckpointError(
            f"{path}: does not hold {name}, elements {start} to {start + size}: the checkpoint is of another model; "
            f"set run.name to begin a new run, or go back to the [model] table in the run folder's config.toml"
        )
    return overlapping


@contextmanager
def _quiet_when_alone() -> Iterator[None]:
    """torch warns that a run of one process has no process group, although `no_dist` says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
