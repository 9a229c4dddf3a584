"""What a checkpoint is made of and loaded into: one rank's part of a run, as live tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dryvine.trainer.checkpoint.files import Place
from dryvine.trainer.checkpoint.manifest import BUFFER, Size

COUNTS = "rl."  # prefix of buffers that belong to a training loop and not to a model
Fields = Mapping[str, Tensor]  # "master", "exp_avg", ...; a field of no dimension holds for the whole piece
Pieces = Mapping[tuple[str, int], Fields]  # (parameter, first element) -> the piece's fields


@dataclass(frozen=True)
class RunState:
    """`pieces` are the parts of parameters that this rank owns, `shapes` the full shapes of those parameters, all
    experts included. `buffers` are the same on all ranks that hold them; each is stored once."""

    pieces: Pieces
    buffers: Mapping[str, Tensor]
    shapes: Mapping[str, Size]

    def tensors(self) -> dict[Place, Tensor]:
        """Everything, by its place."""
        own = {
            Place(name, first, field): tensor
            for (name, first), fields in self.pieces.items()
            for field, tensor in fields.items()
        }
        return own | {Place(name, 0, BUFFER): tensor for name, tensor in self.buffers.items()}
