"""What `Saver` and `MemorySaver` share: a step waits for a copy of the state in host memory, and a thread of each rank
writes that copy while training continues.

The thread itself runs no collective of the mesh, where its messages could interleave with those of a step. Its result
waits until every rank calls `finish` at the same step, and is gathered there: a save is complete on all ranks or none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, cast

from torch import Tensor

from dryvine.comm.mesh import Mesh
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.files import Place
from dryvine.trainer.checkpoint.manifest import Size
from dryvine.trainer.checkpoint.staging import Staging
from dryvine.trainer.checkpoint.state import RunState
from dryvine.trainer.nonfinite import Diverged

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class WriteResult:
    """The result of one rank's write. It succeeded if both fields are empty."""

    nonfinite: list[str]  # names of tensors with an infinity or NaN
    error: str


R = TypeVar("R", bound=WriteResult)


@dataclass(frozen=True)
class WriteResults(Generic[R]):
    """Those of all ranks, on every rank."""

    by_rank: list[R]

    @property
    def nonfinite(self) -> dict[int, list[str]]:
        """Names by rank, without the ranks that have none."""
        return {rank: one.nonfinite for rank, one in enumerate(self.by_rank) if one.nonfinite}

    @property
    def error(self) -> str:
        """The first, or nothing."""
        return next((one.error for one in self.by_rank if one.error), "")


class BackgroundSaver(ABC, Generic[R]):
    """One save at a time. Collective: every rank makes one, and begins and finishes saves at the same steps."""

    def __init__(self, folder: Path, mesh: Mesh, thread: str) -> None:
        """`folder` is the run's; `thread` names the writing thread."""
        self.folder, self.mesh = folder, mesh
        self._staging = Staging(mesh.device)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=thread)
        self._writing: Future[R] | None = None
        self._step = 0

    def prepare(self, state: RunState) -> None:
        """Allocate the host buffers now, so that the first save takes no longer than later ones. Collective."""
        self._staging.prepare(self._stored(state))

    @property
    def pending(self) -> bool:
        """Whether a save was begun and not finished; the same on all ranks."""
        return self._writing is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still at work."""
        return self._writing is not None and not self._writing.done()

    def _begin(self, step: int, state: RunState) -> None:
        """Copy the state to host memory and start writing it."""
        self._step = step
        copies = self._staging.copy(self._stored(state))
        self._writing = self._worker.submit(self._write, step, copies, dict(state.shapes))

    def _gather(self, what: str) -> WriteResults[R] | None:
        """Wait until every rank has written. None if no save was begun. `what` is named if a rank is lost meanwhile."""
        if self._writing is None:
            return None
        own, self._writing = self._writing.result(), None
        return WriteResults(cast(list[R], self.mesh.gather(own, f"{what} {self._step}")))

    def _check_finite(self, results: WriteResults[R]) -> None:
        """Raise Diverged if some rank's state holds what is not finite."""
        if not results.nonfinite:
            return
        newest = run_folder.newest(self.folder)
        back = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint before it"
        who = "; ".join(f"rank {rank}: {_shown(names)}" for rank, names in results.nonfinite.items())
        raise Diverged(f"step {self._step} is not saved, since it holds what is not finite: {who}; {back}")

    def _stored(self, state: RunState) -> Mapping[Place, Tensor]:
        """What this rank stores. Collective."""
        return state.tensors()

    @abstractmethod
    def _write(self, step: int, tensors: Mapping[Place, Tensor], shapes: Mapping[str, Size]) -> R:
        """Runs on the thread."""


def nonfinite(tensors: Mapping[Place, Tensor]) -> list[str]:
    """Names of those that hold what is not finite."""
    return [f"{place.name} ({place.field})" for place, tensor in tensors.items() if not bool(tensor.isfinite().all())]


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
