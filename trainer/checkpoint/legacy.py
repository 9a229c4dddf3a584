"""Checkpoints of format 1 (torch's distributed checkpoint), read as if they had a manifest. Nothing writes them.

Their index is a pickle, and unpickling an untrusted file can run any code. So it is read by an unpickler that knows the
dozen types of such an index and refuses every other name, and the tensors by torch's own restricted one. `dcp.load`
would unpickle the index without a restriction.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from dryvine.trainer.checkpoint.manifest import BUFFER, CheckpointError, Manifest, StoredFile, StoredTensor

if TYPE_CHECKING:  # where such a checkpoint is read: it takes most of a second to import, and every run imports this
    import torch.distributed.checkpoint.metadata as dcp

INDEX, STATE = ".metadata", "state.json"
_CLASSES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}  # fmt: skip


class _Extent(Protocol):
    """Where a stored tensor lies: torch's `_StorageInfo`."""

    relative_path: str
    offset: int
    length: int


class _IndexUnpickler(pickle.Unpickler):
    """Knows only the types of an index, none of which runs code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePosixPath
        raise CheckpointError(f"asks for {module}.{name}, which no checkpoint needs: it is not to be trusted")


@dataclass(frozen=True)
class LegacyReader:
    """A checkpoint of format 1. See `reader.CheckpointReader`."""

    path: Path

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest(
            format=1,
            step=self._step(),
            parameters=self._sizes(),
            files=self._files(),
            tensors=tuple(self._tensors),
        )

    def read(self, tensor: StoredTensor, part: slice) -> Tensor:
        extent = self._extents[tensor.key]
        try:
            with (self.path / tensor.file).open("rb") as opened:
                opened.seek(extent.offset)
                whole = torch.load(io.BytesIO(opened.read(extent.length)), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{self.path / tensor.file}: damaged: {tensor.key}: {reason}") from None
        return whole[part] if tensor.shape else whole

    def damage(self, file: str) -> Iterator[str]:
        """What is wrong with a file: without checksums, only that it cannot be read, or holds values that are not
        finite."""
        for tensor in self.manifest.in_file(file):
            try:
                if not bool(self.read(tensor, slice(None)).isfinite().all()):
                    yield f"{self.path / file}: {tensor.key} is not finite"
            except CheckpointError as error:
                yield str(error)

    @cached_property
    def _index(self) -> dcp.Metadata:
        import torch.distributed.checkpoint.metadata as dcp

        file = self.path / INDEX
        try:
            with file.open("rb") as opened:
                found = _IndexUnpickler(opened).load()
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}") from None
        except Exception:  # a damaged pickle raises whatever its bytes spell
            raise CheckpointError(f"{file}: damaged: it cannot be read") from None
        if not isinstance(found, dcp.Metadata):
            raise CheckpointError(f"{file}: damaged: no index of a checkpoint")
        return found

    @cached_property
    def _extents(self) -> dict[str, _Extent]:
        stored = cast("dict[dcp.MetadataIndex, _Extent]", self._index.storage_data)
        return {index.fqn: extent for index, extent in stored.items()}

    @cached_property
    def _tensors(self) -> list[StoredTensor]:
        return list(self._described())

    def _described(self) -> Iterator[StoredTensor]:
        import torch.distributed.checkpoint.metadata as dcp

        for key, stored in self._index.state_dict_metadata.items():
            if not isinstance(stored, dcp.TensorStorageMetadata) or key not in self._extents:
                raise CheckpointError(f"{self.path / INDEX}: damaged: {key} is not a stored tensor")
            place, _, field = key.rpartition("/")
            name, _, first = (key.removeprefix(f"{BUFFER}/"), "", "0") if place == BUFFER else place.rpartition("@")
            dtype = stored.properties.dtype
            yield StoredTensor(
                name=name,
                first=int(first),
                field=BUFFER if place == BUFFER else field,
                shape=tuple(stored.size),
                dtype=str(dtype).removeprefix("torch."),
                bytes=math.prod(stored.size) * dtype.itemsize,
                checksum="",
                file=self._extents[key].relative_path,
            )

    def _sizes(self) -> dict[str, tuple[int, ...]]:
        sizes: dict[str, int] = {}
        for tensor in self._tensors:
            if tensor.field == "master":
                sizes[tensor.name] = sizes.get(tensor.name, 0) + tensor.elements
        return {name: (size,) for name, size in sizes.items()}

    def _files(self) -> dict[str, StoredFile]:
        ends: dict[str, int] = {}
        for extent in self._extents.values():
            ends[extent.relative_path] = max(ends.get(extent.relative_path, 0), extent.offset + extent.length)
        return {name: StoredFile(bytes=end, header="") for name, end in ends.items()}

    def _step(self) -> int:
        file = self.path / STATE
        try:
            return int(json.loads(file.read_text())["step"])
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{file}: damaged: it does not say which step this is") from None
