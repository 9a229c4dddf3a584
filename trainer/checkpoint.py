"""Checkpoints that know elements of parameters, not ranks: saved in one layout, loaded in any.

Every piece of optimizer state is stored under `parameter@first element/field`, as its owner has it. A rank that loads
asks for what its own pieces overlap, so another pp, ep, dp or schedule reads the same files. torch's distributed
checkpoint does the writing, in parallel and by rank; the weights themselves are not stored, since they are their FP32
masters rounded. A folder gets its name only when it is whole, so a run that dies while saving still has the one before.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dryvine.comm.mesh import Mesh

Place = tuple[str, int]  # parameter, first element
Pieces = Mapping[Place, Mapping[str, Tensor]]  # -> field -> tensor; fields of no dimension hold for the whole piece


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not have what this run needs."""


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run folder."""
    return max((p for p in (folder / "checkpoints").glob("step-*") if p.suffix != ".part"), default=None)


def save(folder: Path, step: int, pieces: Pieces, buffers: Mapping[str, Tensor], keep: int, mesh: Mesh) -> Path:
    """Write checkpoint `step` of a run folder and drop all but the newest `keep`. Collective.

    `buffers` are the same on all ranks that hold them; each is stored once.
    """
    target = folder / "checkpoints" / f"step-{step:08d}"
    part = target.with_suffix(".part")
    if mesh.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    _barrier(mesh)
    state = {f"{name}@{start}/{field}": t for (name, start), fields in pieces.items() for field, t in fields.items()}
    state |= {f"buffer/{name}": t for name, t in buffers.items()}
    with _alone_is_fine():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(part), no_dist=mesh.size == 1)
    if mesh.rank == 0:
        (part / "state.json").write_text(json.dumps({"step": step}) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in sorted(p for p in target.parent.glob("step-*") if p.suffix != ".part")[:-keep]:
            shutil.rmtree(old)
    _barrier(mesh)
    return target


def fields(path: Path) -> set[str]:
    """What is stored of pieces: "master", "exp_avg", ... Whether a checkpoint has an average depends on its run."""
    keys = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {key.rpartition("/")[2] for key in keys if not key.startswith("buffer/")}


def load(path: Path, pieces: Pieces, buffers: Mapping[str, Tensor], mesh: Mesh) -> int:
    """Fill `pieces` and `buffers` in place from a checkpoint of any layout, and of FP32 or BF16 moments, and give its
    step. Collective."""
    reader = dcp.FileSystemReader(path)
    stored = _stored({key: meta.size for key, meta in reader.read_metadata().state_dict_metadata.items()})  # type: ignore[union-attr]
    wanted: dict[str, Tensor] = {f"buffer/{name}": t for name, t in buffers.items()}
    copies: list[tuple[Tensor, Tensor]] = []
    for (name, start), fields in pieces.items():
        size = fields["master"].numel()
        for begin, length in _covering(path, stored, name, start, size):
            low, high = max(begin, start), min(begin + length, start + size)
            for field, live in fields.items():
                key = f"{name}@{begin}/{field}"
                if live.dim() == 0 or (begin, length) == (start, size):
                    wanted[key] = live
                else:
                    source = wanted.setdefault(key, torch.empty(length, dtype=live.dtype, device=live.device))
                    copies.append((live[low - start : high - start], source[low - begin : high - begin]))
    with _alone_is_fine():
        dcp.load(wanted, storage_reader=reader, no_dist=mesh.size == 1)
    for live, source in copies:
        live.copy_(source)
    return int(json.loads((path / "state.json").read_text())["step"])


def _stored(sizes: Mapping[str, torch.Size]) -> dict[str, list[tuple[int, int]]]:
    """Parameter -> the (first element, length) of each of its stored pieces."""
    found: dict[str, list[tuple[int, int]]] = {}
    for key, size in sizes.items():
        if key.endswith("/master"):
            name, start = key.removesuffix("/master").rsplit("@", 1)
            found.setdefault(name, []).append((int(start), size.numel()))
    return found


def _covering(
    path: Path, stored: Mapping[str, list[tuple[int, int]]], name: str, start: int, size: int
) -> list[tuple[int, int]]:
    """The stored pieces that overlap elements start..start+size of a parameter; together they must hold them all."""
    found = [(b, n) for b, n in stored.get(name, []) if b < start + size and start < b + n]
    if sum(min(b + n, start + size) - max(b, start) for b, n in found) != size:
        raise CheckpointError(
            f"{path}: does not hold {name}, elements {start} to {start + size}: the checkpoint is of another model; "
            f"set run.name to begin a new run, or go back to the [model] table in the run folder's config.toml"
        )
    return found


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch warns that a run of one process has no process group, even when told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _barrier(mesh: Mesh) -> None:
    if mesh.size > 1:
        dist.barrier()
