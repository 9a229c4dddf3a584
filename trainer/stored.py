"""The state in a checkpoint by name and element, read and written a slice at a time: for whoever has no rig.

`checkpoint.load` fills the pieces of one rank of a run. Export, import and comparisons have no ranks, and a model that
may be larger than memory: they ask for elements of one parameter, or hand over one piece after the other. Everything
that knows how a checkpoint lies on the disk is in this file and in `checkpoint`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dryvine.trainer.checkpoint import STATE, CheckpointError, Fields

BUFFER = "buffer/"
Shapes = Mapping[str, tuple[int, ...]]


class Stored:
    """What a complete checkpoint holds, whatever layout saved it. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.step = int(json.loads((path / STATE).read_text())["step"])
            meta = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: not a complete checkpoint: {error}") from None
        self._sizes = {key: tuple(m.size) for key, m in meta.items()}  # type: ignore[union-attr]
        self._dtypes = {key: m.properties.dtype for key, m in meta.items()}  # type: ignore[union-attr]
        self._pieces: dict[str, list[tuple[int, int]]] = {}  # of each parameter: (first element, how many)
        for key, size in self._sizes.items():
            if key.endswith("/master"):
                name, first = key.removesuffix("/master").rsplit("@", 1)
                self._pieces.setdefault(name, []).append((int(first), size[0]))
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    @property
    def sizes(self) -> dict[str, int]:
        """How many elements each parameter has."""
        return {name: sum(count for _, count in pieces) for name, pieces in self._pieces.items()}

    @property
    def fields(self) -> frozenset[str]:
        """ "master", and what the optimizer stored beside it."""
        return frozenset(key.rpartition("/")[2] for key in self._sizes if not key.startswith(BUFFER))

    @property
    def buffers(self) -> dict[str, Tensor]:
        names = [key for key in self._sizes if key.startswith(BUFFER)]
        return {key.removeprefix(BUFFER): self._read(key) for key in names}

    def read(self, name: str, first: int, count: int, field: str = "master") -> Tensor:
        """Elements first..first+count of a parameter, flat, in the stored dtype; a field that holds for whole pieces
        is a scalar. Raises CheckpointError if they are not all there."""
        parts = []
        for begin, length in sorted(self._pieces.get(name, [])):
            low, high = max(begin, first), min(begin + length, first + count)
            if low < high:
                piece = self._read(f"{name}@{begin}/{field}")
                if piece.dim() == 0:
                    return piece
                parts.append(piece[low - begin : high - begin])
        if sum(map(len, parts)) != count:
            raise CheckpointError(f"{self.path}: does not hold {name}, elements {first} to {first + count}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, key: str) -> Tensor:
        # Neighbouring slices mostly lie in one piece.
        if self._last[0] != key:
            self._last = (key, torch.empty(self._sizes[key], dtype=self._dtypes[key]))
            with _quiet():
                dcp.load({key: self._last[1]}, storage_reader=dcp.FileSystemReader(self.path), no_dist=True)
        return self._last[1]


def write(
    folder: Path, step: int, pieces: Iterable[tuple[str, int, Fields]], buffers: Mapping[str, Tensor], shapes: Shapes
) -> Path:
    """Write checkpoint `step` of a run folder from pieces, (parameter, first element, fields), that are made one at a
    time; `shapes` are the whole shapes of the parameters. Of one process; not a collective."""
    target = folder / "checkpoints" / f"step-{step:08d}"
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    state = {f"{name}@{first}/{f}": t for name, first, fields in pieces for f, t in fields.items()}
    state |= {BUFFER + name: tensor for name, tensor in buffers.items()}
    with _quiet():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(part), no_dist=True)
    (part / STATE).write_text(json.dumps({"step": step}) + "\n")
    part.rename(target)
    return target


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns that one process has no process group, although `no_dist` says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
