"""What a checkpoint holds, tensor by tensor: `manifest.json`, the file that makes a folder of tensors a checkpoint.

Every stored tensor is named with its place in the model, shape, dtype, bytes and SHA-256, and every parameter with its
whole shape, so a reader can tell, before it reads a tensor, whether anything is missing, damaged or of another model.
The manifest carries a checksum of itself: no byte of a checkpoint is beyond suspicion. JSON, because a checkpoint may
come from anywhere and reading JSON runs no code; torch's distributed checkpoint keeps the same facts in a pickle.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field, ValidationError

FORMAT = 2  # 1 is torch's distributed checkpoint, see legacy.py
NAME = "manifest.json"
BUFFER = "buffer"  # the field of what is no parameter
Size = tuple[int, ...]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, cannot be written, or does not have what this run needs."""


class CannotSave(CheckpointError):
    """A checkpoint that could not be written; those before it are as they were."""


class StoredTensor(BaseModel, frozen=True, extra="forbid"):
    """One field of one piece of a parameter, or a buffer."""

    name: str  # of the parameter or buffer, the same in every layout
    first: int = Field(ge=0)  # the piece's first element, counted in the whole parameter, all experts in
    field: str  # "master", "exp_avg", ...; BUFFER
    shape: Size  # as stored: [elements of the piece], or [] for a value that holds for the whole piece
    dtype: str  # torch's name
    bytes: int = Field(ge=0)
    checksum: str  # SHA-256 of the bytes
    file: str = Field(pattern=r"^[\w.-]+$")  # beside the manifest

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{BUFFER}/{self.name}" if self.field == BUFFER else f"{self.name}@{self.first}/{self.field}"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class StoredFile(BaseModel, frozen=True, extra="forbid"):
    """A file of tensors: a header, then the tensors in the manifest's order without gaps."""

    bytes: int = Field(ge=0)
    header: str  # SHA-256 of what comes before the first tensor


StoredPieces = dict[tuple[str, str], list[StoredTensor]]  # (parameter, field) -> its pieces


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """A checkpoint's contents. `data` and `tokenizer` are fingerprints of what the run reads, None if not known.
    `seconds` is how long its slowest rank took from the copy to the last byte verified, 0 if not known."""

    format: int = FORMAT
    step: int = Field(ge=0)
    data: str | None = None
    tokenizer: str | None = None
    seconds: float = Field(default=0.0, ge=0)
    parameters: dict[str, Size]  # whole shapes; in format 1, which does not know them, [elements]
    files: dict[str, StoredFile]
    tensors: tuple[StoredTensor, ...]

    def in_file(self, name: str) -> list[StoredTensor]:
        """The tensors of a file, in the order in which they lie there."""
        return [tensor for tensor in self.tensors if tensor.file == name]

    def pieces(self) -> StoredPieces:
        """(parameter, field) -> its stored pieces, by first element."""
        found: defaultdict[tuple[str, str], list[StoredTensor]] = defaultdict(list)
        for tensor in sorted(self.tensors, key=lambda tensor: tensor.first):
            if tensor.field != BUFFER:
                found[tensor.name, tensor.field].append(tensor)
        return dict(found)

    def buffers(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensor in self.tensors if tensor.field == BUFFER}

    def gaps(self) -> Iterator[str]:
        """What is missing, or there twice: every element of every parameter must be stored once in each field that the
        parameter has, and must have a master."""
        pieces = self.pieces()
        for name in self.parameters:
            if (name, "master") not in pieces:
                yield f"{name}: no master weights"
        for (name, field), some in pieces.items():
            if name not in self.parameters:
                yield f"{name}: stored, but no parameter has that name"
            elif some[0].shape:
                yield from _gaps(name, field, some, self.parameters[name])


class StoredPart(NamedTuple):
    """Some elements of a stored tensor, flat; of one without dimensions, what holds for all of its piece."""

    tensor: StoredTensor
    part: slice


def overlaps(stored: StoredPieces, name: str, field: str, first: int, count: int) -> Iterator[StoredPart]:
    """The parts of `stored` (`Manifest.pieces`) that hold elements first..first+count of a parameter's field. Which
    elements a piece has, its master says: a field may have one value for all of them."""
    of_field = {tensor.first: tensor for tensor in stored.get((name, field), ())}
    for piece in stored.get((name, "master"), ()):
        low, high = max(piece.first, first), min(piece.first + piece.elements, first + count)
        if low < high and piece.first in of_field:
            yield StoredPart(of_field[piece.first], slice(low - piece.first, high - piece.first))


def _gaps(name: str, field: str, pieces: list[StoredTensor], shape: Size) -> Iterator[str]:
    at = 0
    for piece in pieces:
        if piece.first != at:
            kind = "missing" if piece.first > at else "stored twice"
            yield f"{name}: {field} of {_elements(shape, min(at, piece.first), max(at, piece.first))} is {kind}"
        at = max(at, piece.first + piece.elements)
    if at != math.prod(shape):
        yield f"{name}: {field} of {_elements(shape, at, math.prod(shape))} is missing"


def _elements(shape: Size, start: int, stop: int) -> str:
    """A range of a parameter's elements, and of what has three dimensions the experts that they belong to."""
    text = f"elements {start} to {stop}"
    if len(shape) != 3:
        return text
    expert = math.prod(shape[1:])
    return f"{text} (experts {start // expert} to {(stop - 1) // expert})"


_HEAD, _TAIL = '{{"sha256":"{}","manifest":\n', "\n}\n"


def render(manifest: Manifest) -> str:
    """As it is stored."""
    body = manifest.model_dump_json()
    return _HEAD.format(hashlib.sha256(body.encode()).hexdigest()) + body + _TAIL


def read_manifest(path: Path) -> Manifest:
    """The manifest in the folder `path`. Raises CheckpointError that names the file if a byte of it is not as it was
    written."""
    file = path / NAME
    try:
        text = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    # The bytes themselves are compared: what an earlier version wrote may lack a field that this one would write.
    body = text.partition(b"\n")[2].removesuffix(_TAIL.encode())
    whole = text == _HEAD.format(hashlib.sha256(body).hexdigest()).encode() + body + _TAIL.encode()
    try:
        manifest = Manifest.model_validate_json(body)
    except ValidationError:
        raise CheckpointError(f"{file}: damaged: it cannot be read") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{file}: of format {manifest.format}, this version reads {FORMAT}; use a newer one")
    if not whole:
        raise CheckpointError(f"{file}: damaged: its checksum is not that of its contents")
    return manifest
