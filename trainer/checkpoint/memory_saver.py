"""Copies of every rank's state in host memory, on its own node and on its buddy's.

After the loss of a process or node nothing is read from storage, and only the steps since the last copy are repeated,
which may be far fewer than since the last checkpoint. A copy is a checkpoint of the state of one rank, in a folder in
memory, written and verified by the same code as those in storage; copies received from another node are verified
likewise. A background thread of each rank writes its own copy, sends it, and receives those of its clients. When all
ranks have done so, each renames its copies to their final names, and when all have, deletes the previous ones: a kill
at any instant leaves one step with a complete copy of every rank.

A copy holds all of a rank's state, buffers too, so a restarted rank reads one copy and needs no other. Parity over
several nodes, as in RAID, would take less memory, but would read from all of them to restore one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from dryvine.comm.buddies import BuddyLinks, allocate
from dryvine.comm.mesh import Mesh
from dryvine.trainer.checkpoint import attempts, run_folder
from dryvine.trainer.checkpoint.background import BackgroundSaver, WriteResult, nonfinite
from dryvine.trainer.checkpoint.files import Place, damage, write_file, write_manifest
from dryvine.trainer.checkpoint.manifest import CheckpointError, Manifest, Size, read_manifest
from dryvine.trainer.checkpoint.state import RunState
from dryvine.trainer.config import RunConfig
from dryvine.trainer.data.identity import DataIdentity


class MemorySaver(BackgroundSaver[WriteResult]):
    """The copies in memory of one attempt. Collective: every rank calls `begin` and `finish` at the same steps."""

    def __init__(self, run: RunConfig, mesh: Mesh, node: int, links: BuddyLinks | None, identity: DataIdentity) -> None:
        """`node` is the number of this rank's; with `links` None, copies are kept on its own node only."""
        super().__init__(run.folder, mesh, "buddies")
        self.run, self.links, self.identity = run, links, identity
        self.attempt = attempts.begin_attempt(run, mesh)
        held = (mesh.rank, *(links.clients if links else ()))
        self._homes = {rank: attempts.home(run, self.attempt, node, rank) for rank in held}
        self._finished = 0

    def begin(self, step: int, state: RunState) -> str:
        """Copy the state to host memory and start to write and send it. Finishes the previous copy first: returns and
        raises what `finish` does. Collective."""
        failure = self.finish()
        self._begin(step, state)
        return failure

    def finish(self) -> str:
        """Wait until every rank has its copies of the step, and make them the newest. Returns why that failed, or
        nothing; the previous copies are then kept. Raises Diverged, on all ranks, if the state is not finite.
        Collective."""
        results = self._gather("copies in memory of step")
        if results is None:
            return ""
        if results.nonfinite or results.error:
            self._drop()
        self._check_finite(results)
        if results.error:
            return f"no copy of step {self._step} in memory: {results.error}; the previous copies are kept"
        self._publish()
        return ""

    def close(self, forget: bool) -> str:
        """Finish. `forget`: a checkpoint holds the final state, so free the memory. Returns and raises what `finish`
        does. Collective."""
        failure = self.finish()
        self._worker.shutdown()
        if forget:
            attempts.keep_only(self.run, self.mesh)
        return failure

    def _publish(self) -> None:
        for home in self._homes.values():
            run_folder.publish_step(home, self._step)
        # The previous step must stay complete until every rank has renamed its copies of this one.
        self.mesh.barrier("naming copies in memory")
        for home in self._homes.values():
            run_folder.prune(home, last=1, every=None)
        self._finished += 1
        if self._finished == 1:
            attempts.keep_only(self.run, self.mesh, [self.attempt])

    def _drop(self) -> None:
        for home in self._homes.values():
            shutil.rmtree(run_folder.named(home, self._step, ".part"), ignore_errors=True)

    # On the thread.

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
        """Returns why it failed, or nothing."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            _, file = attempts.files(path, self.mesh.rank)
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
        """Send this rank's copy, if it is `whole`, and receive those of clients. Returns what is wrong with those."""
        own = attempts.files(parts[self.mesh.rank], self.mesh.rank) if whole else ()
        sizes = links.tell([file.stat().st_size for file in own] or [0, 0])
        room = {client: self._make_room(parts[client], client, sizes[client]) for client in links.clients}
        wanted = links.answer({client: not why for client, why in room.items()})
        taken = [client for client in links.clients if not room[client] and all(sizes[client])]
        links.swap(own if wanted else (), {client: attempts.files(parts[client], client) for client in taken})
        wrong = (wrong for client in taken for wrong in self._damage(parts[client]))
        return next(wrong, next((why for why in room.values() if why), ""))

    def _make_room(self, path: Path, client: int, sizes: list[int]) -> str:
        """Allocate the files that a client is about to send. Returns why that failed, or nothing."""
        if not all(sizes):  # it has nothing to send, and reports why itself
            return ""
        try:
            path.mkdir(parents=True, exist_ok=True)
            for file, size in zip(attempts.files(path, client), sizes, strict=True):
                allocate(file, size)
        except OSError as full:
            with suppress(OSError):
                shutil.rmtree(path)
            return f"{path}: {full.strerror}"
        return ""

    def _damage(self, path: Path) -> list[str]:
        manifest = read_manifest(path)
        return [wrong for name in manifest.files for wrong in damage(path, manifest, name)]
