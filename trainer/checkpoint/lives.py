"""Which copies in host memory are of this run: those of the lives that its folder lists.

A life is one start of a run, up to its end. Its copies lie in the memory of every node, by a name that no other life
has, and the run folder, which all nodes see, lists it in `lives.txt`. So copies of a run whose folder was deleted, of a
time that a rollback gave up, or of a run that has ended are read by nobody, whichever node still has them; and a step's
copies are only put together if one life wrote all of them.

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

FILE = "lives.txt"
_RANK = re.compile(r"rank-(\d{5,})")


@dataclass(frozen=True)
class MemoryCopy:
    """Of one rank's state at one step, in the memory of the host that has found it."""

    life: str
    step: int
    owner: int  # the rank whose state it is
    host: str
    path: Path
    sizes: tuple[int, ...]  # bytes of its files, by name


def check_folder(run: RunConfig) -> None:
    """Raise ConfigError if this host cannot keep copies in `run.buddy_folder`."""
    if run.buddy_every and not (os.path.isdir(run.buddy_folder) and os.access(run.buddy_folder, os.W_OK)):
        raise ConfigError(
            f"run.buddy_folder = {run.buddy_folder!r} is no folder of this host that can be written to; set it to one "
            f"that is in memory, or leave run.buddy_every out"
        )


def begin_life(run: RunConfig, mesh: Mesh) -> str:
    """The name of a new life, which the run folder lists from now on. Collective."""
    life = cast(str, mesh.gather(secrets.token_hex(8), "the name of this life")[0])
    _list(run, mesh, [*listed(run), life])
    make_folder(run, life)
    return life


def make_folder(run: RunConfig, life: str) -> None:
    """On this host, for copies of a life: nobody else may read a run's weights there. Raises OSError."""
    _folder(run, life).mkdir(mode=0o700, exist_ok=True)


def keep_only(run: RunConfig, mesh: Mesh, keep: Sequence[str] = ()) -> None:
    """Forget all lives but `keep`, and free their memory on this node. Collective."""
    lives = cast(list[list[str]], mesh.gather(listed(run), "lives of this run"))[0]
    if gone := [life for life in lives if life not in keep]:
        _list(run, mesh, keep)
        for life in gone:
            shutil.rmtree(_folder(run, life), ignore_errors=True)  # by every rank of the node at once


def listed(run: RunConfig) -> list[str]:
    """The lives of a run, oldest first."""
    file = run.folder / FILE
    return file.read_text().split() if file.exists() else []


def home(run: RunConfig, life: str, node: int, rank: int) -> Path:
    """Where a node keeps the copies of a rank: a run folder."""
    return _folder(run, life) / f"node-{node}" / f"rank-{rank:05d}"


def found(run: RunConfig) -> Iterator[MemoryCopy]:
    """What this host has of the run's lives. A folder that is not a whole copy, or goes meanwhile, is none."""
    for life in listed(run):
        for folder in sorted(_folder(run, life).glob("node-*/rank-*")):
            if named := _RANK.fullmatch(folder.name):
                with suppress(OSError):
                    yield from (_copy(life, int(named[1]), path) for path in run_folder.complete(folder))


def _copy(life: str, owner: int, path: Path) -> MemoryCopy:
    """Raises OSError."""
    sizes = tuple(file.stat().st_size for file in files(path, owner))
    return MemoryCopy(life, run_folder.step_of(path), owner, socket.gethostname(), path, sizes)


def files(path: Path, owner: int) -> tuple[Path, Path]:
    """Of a rank's copy."""
    return path / NAME, path / f"rank-{owner:05d}.safetensors"


def _folder(run: RunConfig, life: str) -> Path:
    return Path(run.buddy_folder) / f"dryvine-{life}"


def _list(run: RunConfig, mesh: Mesh, lives: Sequence[str]) -> None:
    """Before any rank goes on."""
    if mesh.rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(run.folder / FILE, "".join(f"{life}\n" for life in lives))
    mesh.barrier("listing the lives of this run")
