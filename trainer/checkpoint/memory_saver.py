"""Copies of the run's state in host memory: of every rank on its own node and on its buddy's.

A lost process or node then costs no read from storage, and the steps since the last copy, which may be far fewer than
since the last checkpoint. A copy is a checkpoint of what one rank owns, in a folder in memory, written and verified by
the same code; so is what arrives from another node. Beside the training a thread of each rank writes the own one, sends
it, and takes in what others send. When all ranks have done so, each gives its copies their names, and when all have,
deletes those before: a kill at any instant leaves one step of which every rank's copy is named.

All that a rank holds is in its copy, buffers too, so a rank that comes back reads one copy and needs no other. Parity
over several nodes, as RAID has it, would take less memory, and all of them to restore one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from dryvine.comm.buddies import BuddyLinks, allocate
from dryvine.comm.mesh import Mesh
from dryvine.trainer.checkpoint import lives, run_folder
from dryvine.trainer.checkpoint.background import BackgroundSaver, WriteResult, nonfinite
from dryvine.trainer.checkpoint.files import Place, damage, write_file, write_manifest
from dryvine.trainer.checkpoint.manifest import CheckpointError, Manifest, Size, read_manifest
from dryvine.trainer.checkpoint.state import RunState
from dryvine.trainer.config import RunConfig
from dryvine.trainer.data.identity import DataIdentity


class MemorySaver(BackgroundSaver[WriteResult]):
    """Of one life of a run. Collective, as a `Saver` is: every rank calls `begin` and `finish` at the same steps."""

    def __init__(self, run: RunConfig, mesh: Mesh, node: int, links: BuddyLinks | None, identity: DataIdentity) -> None:
        """`node` is this rank's; `links` None: copies are on its own node only."""
        super().__init__(run.folder, mesh, "buddies")
        self.run, self.links, self.identity = run, links, identity
        self.life = lives.begin_life(run, mesh)
        held = (mesh.rank, *(links.clients if links else ()))
        self._homes = {rank: lives.home(run, self.life, node, rank) for rank in held}
        self._finished = 0

    def begin(self, step: int, state: RunState) -> str:
        """Copy the state to host memory and begin to write and send it. Returns and raises what `finish` does of the
        copy before. Collective."""
        said = self.finish()
        self._begin(step, state)
        return said

    def finish(self) -> str:
        """Wait until every rank has its copies of the step, and name them. Returns why there are none, if there are
        none: the ones before are as they were. Raises Diverged, on all ranks, if the state holds what is not finite.
        Collective."""
        results = self._gather("copies in memory of step")
        if results is None:
            return ""
        if results.nonfinite or results.error:
            self._drop()
        self._check_finite(results)
        if results.error:
            return f"no copy of step {self._step} in memory: {results.error}; those before it are as they were"
        self._publish()
        return ""

    def close(self, forget: bool) -> str:
        """Finish. `forget`: all is in a checkpoint, so free the memory. Returns and raises what `finish` does.
        Collective."""
        said = self.finish()
        self._worker.shutdown()
        if forget:
            lives.keep_only(self.run, self.mesh)
        return said

    def _publish(self) -> None:
        for home in self._homes.values():
            run_folder.publish_step(home, self._step)
        # Until every rank has named its copies of this step, the step before must be whole.
        self.mesh.barrier("naming copies in memory")
        for home in self._homes.values():
            run_folder.prune(home, last=1, every=None)
        self._finished += 1
        if self._finished == 1:
            lives.keep_only(self.run, self.mesh, [self.life])

    def _drop(self) -> None:
        for home in self._homes.values():
            shutil.rmtree(run_folder.named(home, self._step, ".part"), ignore_errors=True)

    # The thread.

    def _write(self, step: int, tensors: Mapping[Place, Tensor], shapes: Mapping[str, Size]) -> WriteResult:
        parts = {rank: run_folder.named(home, step, ".part") for rank, home in self._homes.items()}
        bad = nonfinite(tensors)
        error = "" if bad else self._write_own(parts[self.mesh.rank], step, tensors, shapes)
        if self.links:
            try:
                error = error or self._swap(self.links, parts, whole=not bad and not error)
            except (OSError, CheckpointError, RuntimeError) as broken:  # RuntimeError: of gloo
                error = f"rank {self.mesh.rank}: {broken}"
        return WriteResult(bad, error)

    def _write_own(self, path: Path, step: int, tensors: Mapping[Place, Tensor], shapes: Mapping[str, Size]) -> str:
        """Returns why it could not."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            _, file = lives.files(path, self.mesh.rank)
            written = write_file(file, tensors)
            manifest = Manifest(
                step=step,
                data=self.identity.data,
                tokenizer=self.identity.tokenizer,
                parameters=dict(shapes),
                files={written.name: written.file},
                tensors=tuple(written.tensors),
            )
            write_manifest(path, manifest)
        except OSError as full:
            return f"{path}: {full.strerror}"
        return ""

    def _swap(self, links: BuddyLinks, parts: Mapping[int, Path], whole: bool) -> str:
        """Send this rank's copy, if it is `whole`, and take in those of clients. Returns what is wrong with these."""
        own = lives.files(parts[self.mesh.rank], self.mesh.rank) if whole else ()
        sizes = links.tell([file.stat().st_size for file in own] or [0, 0])
        room = {client: self._make_room(parts[client], client, sizes[client]) for client in links.clients}
        wanted = links.answer({client: not why for client, why in room.items()})
        taken = [client for client in links.clients if not room[client] and all(sizes[client])]
        links.swap(own if wanted else (), {client: lives.files(parts[client], client) for client in taken})
        wrong = (wrong for client in taken for wrong in self._damage(parts[client]))
        return next(wrong, next((why for why in room.values() if why), ""))

    def _make_room(self, path: Path, client: int, sizes: list[int]) -> str:
        """Make the files that a client is about to send. Returns why it could not."""
        if not all(sizes):  # it has nothing to send, and says so itself
            return ""
        try:
            path.mkdir(parents=True, exist_ok=True)
            for file, size in zip(lives.files(path, client), sizes, strict=True):
                allocate(file, size)
        except OSError as full:
            with suppress(OSError):
                shutil.rmtree(path)
            return f"{path}: {full.strerror}"
        return ""

    def _damage(self, path: Path) -> list[str]:
        manifest = read_manifest(path)
        return [wrong for name in manifest.files for wrong in damage(path, manifest, name)]
