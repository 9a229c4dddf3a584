"""Saving beside the training: a step waits for a copy to host memory, a thread of each rank writes that copy.

Each rank writes one file of what it owns, reads it back from the disk, and checks what it read. When all have (the loop
learns so from a figure in the reduction that every step makes anyway) rank 0 writes the manifest, gives the folder its
name and only then deletes older ones. So no thread talks to other ranks, where its messages could meet those of a step,
and a rank that dies leaves an unfinished folder that nothing reads. What is not finite is never named: a later start
would go on from it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from torch import Tensor

from dryvine.comm.mesh import Mesh
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.files import Place, Written, damage, write_file, write_manifest
from dryvine.trainer.checkpoint.manifest import BUFFER, NAME, CannotSave, Manifest, Size
from dryvine.trainer.checkpoint.staging import Staging
from dryvine.trainer.checkpoint.state import RunState
from dryvine.trainer.data.identity import UNKNOWN, DataIdentity
from dryvine.trainer.nonfinite import Diverged

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest `last`, and those of steps that `every` divides."""

    last: int
    every: int | None = None


class _Part(NamedTuple):
    """The result of writing one rank's part of a checkpoint."""

    written: Written | None  # None if it failed
    shapes: Mapping[str, Size]
    nonfinite: list[str]
    error: str
    seconds: float = 0.0


class Saver:
    """Saves checkpoints of one run, one at a time. Collective: every rank makes one, and calls `begin` and `finish` at
    the same steps."""

    def __init__(self, folder: Path, keep: Keep, mesh: Mesh, identity: DataIdentity = UNKNOWN) -> None:
        """`identity` is stored, and compared when the run goes on."""
        self.folder, self.keep, self.mesh, self.identity = folder, keep, mesh, identity
        self._staging = Staging(mesh.device)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._writing: Future[_Part] | None = None
        self._pruning: Future[None] | None = None
        self._step, self._begun = 0, 0.0
        self._owned_buffers: frozenset[str] | None = None
        if mesh.rank == 0:
            run_folder.clear_unfinished(folder)
        # No rank begins to write into a folder that rank 0 is about to clear.
        mesh.barrier("clearing unfinished checkpoints")

    def prepare(self, state: RunState) -> None:
        """Allocate the host's buffers now, so that the first save does not stall longer than others. Collective."""
        self._staging.prepare(self._stored(state))

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and not finished; the same on all ranks."""
        return self._writing is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._writing is not None and not self._writing.done()

    def begin(self, step: int, state: RunState) -> None:
        """Copy the state to host memory and begin to write it. Finishes the checkpoint before, if there is one.
        Collective; raises what `finish` does."""
        self.finish()
        self._step, self._begun = step, time.monotonic()
        copies = self._staging.copy(self._stored(state))
        self._writing = self._worker.submit(self._write, step, copies, dict(state.shapes))

    def finish(self) -> Path | None:
        """Wait until every rank has written and verified its part, then make it the newest checkpoint. Returns its
        folder, or None if none was begun. Collective; on all ranks raises CannotSave if it could not be written,
        Diverged if it holds what is not finite. Then it is gone, and the ones before are as they were."""
        if self._writing is None:
            return None
        part, self._writing = self._writing.result(), None
        parts = cast(list[_Part], self.mesh.gather(part, f"parts of checkpoint {self._step}"))
        bad = {rank: part.nonfinite for rank, part in enumerate(parts) if part.nonfinite}
        error = next((part.error for part in parts if part.error), "")
        if self.mesh.rank == 0:
            error = self._drop(error) if error or bad else self._publish(parts)
        error = cast(str, self.mesh.gather(error, f"the end of checkpoint {self._step}")[0])
        if bad:
            raise Diverged(nonfinite_line(self._step, bad, run_folder.newest(self.folder)))
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

    # The thread.

    def _write(self, step: int, tensors: Mapping[Place, Tensor], shapes: Mapping[str, Size]) -> _Part:
        path = run_folder.named(self.folder, step, ".part")
        file = path / f"rank-{self.mesh.rank:05d}.safetensors"
        if bad := nonfinite(tensors):
            return _Part(None, shapes, bad, "")
        try:
            path.mkdir(parents=True, exist_ok=True)
            written = write_file(file, tensors)
        except OSError as error:
            return _Part(None, shapes, [], _cannot_write(file, error))
        one = Manifest(step=step, parameters={}, files={written.name: written.file}, tensors=tuple(written.tensors))
        wrong = next(damage(path, one, written.name), "")
        wrong = wrong and f"{wrong} when it was read back: the disk is not to be trusted"
        return _Part(written, shapes, [], wrong, time.monotonic() - self._begun)

    # Rank 0.

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
            return self._drop(f"checkpoint {self._step} is not whole, and so not kept: {gap}")
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
        f"{file}: {error.strerror}; the checkpoints before it are as they were: mend that, and the same command goes "
        f"on from the newest"
    )


def nonfinite(tensors: Mapping[Place, Tensor]) -> list[str]:
    """Names of those that hold what is not finite."""
    return [f"{place.name} ({place.field})" for place, tensor in tensors.items() if not bool(tensor.isfinite().all())]


def nonfinite_line(step: int, nonfinite: Mapping[int, list[str]], newest: Path | None) -> str:
    """Why a step's state is not kept. `nonfinite` are names by rank."""
    who = "; ".join(
        f"rank {rank}: {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' * (len(names) > SHOWN)}"
        for rank, names in nonfinite.items()
    )
    back = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint before it"
    return f"step {step} is not saved, since it holds what is not finite: {who}; {back}"
