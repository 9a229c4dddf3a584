"""Files of tensors: safetensors, written and checked in one pass over the bytes.

Written here and not by the library, whose writer takes a copy of every tensor, computes no checksums, and does not
sync; the format is a length, a JSON header and the bytes. Read by the library, which maps the file and so reads of a
tensor only the part that is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.manifest import NAME, CheckpointError, Manifest, StoredFile, StoredTensor, render

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}  # safetensors' names of dtypes
CHUNK = 1 << 24  # bytes read at a time when a file is checked


class Place(NamedTuple):
    """What a stored tensor holds, see `StoredTensor`."""

    name: str
    first: int
    field: str


class Written(NamedTuple):
    """A file of one rank, as the manifest describes it."""

    name: str
    file: StoredFile
    tensors: list[StoredTensor]


def write_file(path: Path, tensors: Mapping[Place, Tensor]) -> Written:
    """Write CPU tensors to a new file and make it durable. Raises OSError."""
    # The library's order: wider elements first, so that each lies at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    stored = [_described(place, tensor, path.name) for place, tensor in ordered]
    header = _header(stored, [CODES[tensor.dtype] for _, tensor in ordered])
    with path.open("wb") as out:
        out.write(header)
        for _, tensor in ordered:
            out.write(_bytes(tensor))
        _sync(out)
        size = out.tell()
    return Written(path.name, StoredFile(bytes=size, header=hashlib.sha256(header).hexdigest()), stored)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of the checkpoint `path`, whose files are written, and make both durable. Raises OSError."""
    with (path / NAME).open("wb") as out:
        out.write(render(manifest).encode())
        _sync(out)
    run_folder.sync_folder(path)


def _sync(file: BinaryIO) -> None:
    """Bring a file to the disk, and drop it from the page cache, so that reading it again reads the disk."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def damage(path: Path, manifest: Manifest, file: str) -> Iterator[str]:
    """What is wrong with a file of the checkpoint `path`; nothing if it has the bytes that the manifest says."""
    where, expected = path / file, manifest.files[file]
    try:
        with where.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != expected.bytes:
                yield f"{where}: damaged: {size} bytes, {expected.bytes} were written"
                return
            tensors = manifest.in_file(file)
            if _digest(opened, expected.bytes - sum(tensor.bytes for tensor in tensors)) != expected.header:
                yield f"{where}: damaged: its header is not as it was written"
            for tensor in tensors:
                if _digest(opened, tensor.bytes) != tensor.checksum:
                    yield f"{where}: damaged: {tensor.key} is not as it was written"
    except OSError as error:
        yield f"{where}: {error.strerror}"


def read_part(path: Path, tensor: StoredTensor, part: slice) -> Tensor:
    """A slice of a stored tensor of the checkpoint `path`; of one without dimensions, all of it."""
    try:
        with safe_open(path / tensor.file, framework="pt") as opened:
            return opened.get_slice(tensor.key)[part] if tensor.shape else opened.get_tensor(tensor.key)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / tensor.file}: {tensor.key} cannot be read: {error}") from None


def _described(place: Place, tensor: Tensor, file: str) -> StoredTensor:
    return StoredTensor(
        name=place.name,
        first=place.first,
        field=place.field,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        bytes=tensor.nbytes,
        checksum=hashlib.sha256(_bytes(tensor)).hexdigest(),
        file=file,
    )


def _header(stored: list[StoredTensor], codes: list[str]) -> bytes:
    entries, at = {}, 0
    for tensor, code in zip(stored, codes, strict=True):
        end = at + tensor.bytes
        entries[tensor.key] = {"dtype": code, "shape": tensor.shape, "data_offsets": (at, end)}
        at = end
    return encoded_header(entries)


def encoded_header(entries: Mapping[str, object]) -> bytes:
    """The start of a safetensors file: length and JSON, padded with blanks to a multiple of 8 bytes."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(file: BinaryIO, size: int) -> str:
    """SHA-256 of the next `size` bytes."""
    digest = hashlib.sha256()
    while size:
        part = file.read(min(size, CHUNK))
        if not part:
            break
        digest.update(part)
        size -= len(part)
    return digest.hexdigest()
