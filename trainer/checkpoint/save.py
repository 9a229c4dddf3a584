"""Asynchronous checkpoints in storage; `background.py` has the copy to host memory and the thread.

Each rank writes one file of the state it owns, reads it back from the disk, and verifies its checksums. When all have
(the loop learns so from a figure in the reduction that every step makes anyway) rank 0 writes the manifest, renames the
folder to its final name and only then deletes older ones. So a rank that dies leaves an unfinished folder that nothing
reads. A state that is not finite never gets a final name: a later start would resume from it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from dryvine.comm.mesh import Mesh
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.background import BackgroundSaver, WriteResult, nonfinite
from dryvine.trainer.checkpoint.files import Place, Written, damage, write_file, write_manifest
from dryvine.trainer.checkpoint.manifest import BUFFER, NAME, CannotSave, Manifest, Size
from dryvine.trainer.checkpoint.state import RunState
from dryvine.trainer.data.identity import UNKNOWN, DataIdentity


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest `last`, and those of steps that `every` divides."""

    last: int
    every: int | None = None


@dataclass(frozen=True)
class _Part(WriteResult):
    """The result of writing one rank's part of a checkpoint."""

    shapes: Mapping[str, Size]
    written: Written | None = None  # None if it failed
    seconds: float = 0.0


class Saver(BackgroundSaver[_Part]):
    """Saves checkpoints of one run, one at a time. Collective: every rank makes one, and calls `begin` and `finish` at
    the same steps."""

    def __init__(self, folder: Path, keep: Keep, mesh: Mesh, identity: DataIdentity = UNKNOWN) -> None:
        """`identity` is stored, and compared when the run resumes."""
        super().__init__(folder, mesh, "save")
        self.keep, self.identity = keep, identity
        self._pruning: Future[None] | None = None
        self._begun = 0.0
        self._owned_buffers: frozenset[str] | None = None
        if mesh.rank == 0:
            run_folder.clear_unfinished(folder)
        # No rank begins to write into a folder that rank 0 is about to clear.
        mesh.barrier("clearing unfinished checkpoints")

    def begin(self, step: int, state: RunState) -> None:
        """Copy the state to host memory and start to write it. Finishes the previous checkpoint first. Collective;
        raises what `finish` does."""
        self.finish()
        self._begun = time.monotonic()
        self._begin(step, state)

    def finish(self) -> Path | None:
        """Wait until every rank has written and verified its part, then make it the newest checkpoint. Returns its
        folder, or None if none was begun. Collective. Raises, on all ranks, CannotSave if it could not be written and
        Diverged if the state is not finite; the checkpoint is then deleted, and the previous ones are kept."""
        results = self._gather("parts of checkpoint")
        if results is None:
            return None
        error = results.error
        if self.mesh.rank == 0:
            error = self._drop(error) if error or results.nonfinite else self._publish(results.by_rank)
        error = cast(str, self.mesh.gather(error, f"the end of checkpoint {self._step}")[0])
        self._check_finite(results)
        if error:
            raise CannotSave(error)
        return run_folder.named(self.folder, self._step)

    def close(self) -> None:
        """Finish, and wait until older checkpoints are deleted. Collective; raises what `finish` does."""
        self.finish()
        self._worker.shutdown()
        if self._pruning:
            self._pruning.result()

    def _stored(self, state: RunState) -> dict[Place, Tensor]:
        """What this rank stores: its pieces, and the buffers that no rank before it holds."""
        if self._owned_buffers is None:
            held = cast(list[list[str]], self.mesh.gather(list(state.buffers), "names of buffers"))
            before = {name for names in held[: self.mesh.rank] for name in names}
            self._owned_buffers = frozenset(state.buffers) - before
        return {
            place: tensor
            for place, tensor in state.tensors().items()
            if place.field != BUFFER or place.name in self._owned_buffers
        }

    # On the thread.

    def _write(self, step: int, tensors: Mapping[Place, Tensor], shapes: Mapping[str, Size]) -> _Part:
        path = run_folder.named(self.folder, step, ".part")
        file = path / f"rank-{self.mesh.rank:05d}.safetensors"
        if bad := nonfinite(tensors):
            return _Part(bad, "", shapes)
        try:
            path.mkdir(parents=True, exist_ok=True)
            written = write_file(file, tensors)
        except OSError as error:
            return _Part([], _cannot_write(file, error), shapes)
        one = Manifest(step=step, parameters={}, files={written.name: written.file}, tensors=tuple(written.tensors))
        wrong = next(damage(path, one, written.name), "")
        wrong = wrong and f"{wrong} when it was read back: the disk returns other bytes than were written"
        return _Part([], wrong, shapes, written, time.monotonic() - self._begun)

    # On rank 0.

    def _publish(self, parts: list[_Part]) -> str:
        """Returns why it failed, or nothing."""
        written = [part.written for part in parts if part.written]
        manifest = Manifest(
            step=self._step,
            data=self.identity.data,
            tokenizer=self.identity.tokenizer,
            seconds=max(part.seconds for part in parts),
            parameters={name: shape for part in parts for name, shape in part.shapes.items()},
            files={one.name: one.file for one in written},
            tensors=tuple(tensor for one in written for tensor in one.tensors),
        )
        path = run_folder.named(self.folder, self._step, ".part")
        if gap := next(manifest.gaps(), None):
            return self._drop(f"checkpoint {self._step} is incomplete, and so not kept: {gap}")
        try:
            write_manifest(path, manifest)
            run_folder.publish_step(self.folder, self._step)
        except OSError as error:
            return self._drop(_cannot_write(path / NAME, error))
        self._pruning = self._worker.submit(run_folder.prune, self.folder, self.keep.last, self.keep.every)
        return ""

    def _drop(self, error: str) -> str:
        """Delete the checkpoint in progress; the space it takes may be what is missing."""
        shutil.rmtree(run_folder.named(self.folder, self._step, ".part"), ignore_errors=True)
        return error


def _cannot_write(file: Path, error: OSError) -> str:
    return (
        f"{file}: {error.strerror}; the checkpoints before it are as they were: fix that and run the same command "
        f"again, which resumes from the newest"
    )
