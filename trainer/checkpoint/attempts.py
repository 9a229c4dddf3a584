"""Which copies in host memory belong to this run: those of the attempts that its folder lists.

An attempt is the time from one start of a run to its end. Its copies are kept in the memory of every node under a
random name, and the run folder, which all nodes see, lists that name in `attempts.txt`. So copies of a run whose folder
was deleted, of steps that a rollback discarded, or of a run that has ended are never read, whichever node still has
them; and the copies of a step are only combined if the same attempt wrote all of them.

    /dev/shm/dryvine-3f9a1c.../node-1/rank-00009/checkpoints/step-00000400/
        manifest.json, rank-00009.safetensors: a checkpoint of what rank 9 owns, kept by node 1
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dryvine.comm.mesh import Mesh
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.manifest import NAME
from dryvine.trainer.config import ConfigError, RunConfig
from dryvine.trainer.data.atomic import write_atomically

FILE = "attempts.txt"
_RANK = re.compile(r"rank-(\d{5,})")


@dataclass(frozen=True)
class MemoryCopy:
    """One rank's state at one step, in the memory of the host that reports it."""

    attempt: str
    step: int
    owner: int  # the rank whose state it is
    host: str
    path: Path
    sizes: tuple[int, ...]  # bytes of its files, by name


def check_folder(run: RunConfig) -> None:
    """Raise ConfigError if this host cannot write copies to `run.buddy_folder`."""
    if run.buddy_every and not (os.path.isdir(run.buddy_folder) and os.access(run.buddy_folder, os.W_OK)):
        raise ConfigError(
            f"run.buddy_folder = {run.buddy_folder!r} is not a writable folder of this host; set it to one that is in "
            f"memory, or leave run.buddy_every out"
        )


def begin_attempt(run: RunConfig, mesh: Mesh) -> str:
    """Add a new attempt to the run folder's list. Returns its name. Collective."""
    attempt = cast(str, mesh.gather(secrets.token_hex(8), "the name of this attempt")[0])
    _list(run, mesh, [*listed(run), attempt])
    make_folder(run, attempt)
    return attempt


def make_folder(run: RunConfig, attempt: str) -> None:
    """Make this host's folder for the copies of an attempt, readable by its user only. Raises OSError."""
    _folder(run, attempt).mkdir(mode=0o700, exist_ok=True)


def keep_only(run: RunConfig, mesh: Mesh, keep: Sequence[str] = ()) -> None:
    """Remove all attempts but `keep` from the list, and free their memory on this node. Collective."""
    known = cast(list[list[str]], mesh.gather(listed(run), "attempts of this run"))[0]
    if gone := [attempt for attempt in known if attempt not in keep]:
        _list(run, mesh, keep)
        for attempt in gone:
            shutil.rmtree(_folder(run, attempt), ignore_errors=True)  # by every rank of the node at once


def listed(run: RunConfig) -> list[str]:
    """The attempts of a run, oldest first."""
    file = run.folder / FILE
    return file.read_text().split() if file.exists() else []


def home(run: RunConfig, attempt: str, node: int, rank: int) -> Path:
    """The folder in which a node keeps the copies of a rank; laid out as a run folder."""
    return _folder(run, attempt) / f"node-{node}" / f"rank-{rank:05d}"


def found(run: RunConfig) -> Iterator[MemoryCopy]:
    """The complete copies of the run's attempts on this host. Folders that are deleted meanwhile are skipped."""
    for attempt in listed(run):
        for folder in sorted(_folder(run, attempt).glob("node-*/rank-*")):
            if named := _RANK.fullmatch(folder.name):
                with suppress(OSError):
                    yield from (_copy(attempt, int(named[1]), path) for path in run_folder.complete(folder))


def _copy(attempt: str, owner: int, path: Path) -> MemoryCopy:
    """Raises OSError."""
    sizes = tuple(file.stat().st_size for file in files(path, owner))
    return MemoryCopy(attempt, run_folder.step_of(path), owner, socket.gethostname(), path, sizes)


def files(path: Path, owner: int) -> tuple[Path, Path]:
    """The manifest and the tensors of a rank's copy."""
    return path / NAME, path / f"rank-{owner:05d}.safetensors"


def _folder(run: RunConfig, attempt: str) -> Path:
    return Path(run.buddy_folder) / f"dryvine-{attempt}"


def _list(run: RunConfig, mesh: Mesh, names: Sequence[str]) -> None:
    """Write the list on rank 0. Returns on all ranks once it is written."""
    if mesh.rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(run.folder / FILE, "".join(f"{name}\n" for name in names))
    mesh.barrier("listing the attempts of this run")
