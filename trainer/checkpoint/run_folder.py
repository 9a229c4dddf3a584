"""The `checkpoints/` folder of a run: which entries are checkpoints, which is newest, and which may go.

    step-00000400/        a checkpoint: it got this name when all of it was on the disk and verified
    step-00000600.part/   one that is being written, or was when its run died; cleared at the next start
    step-00000500.damaged/   one that a start with run.on_damage = "previous" has passed over
    latest                a link to the newest, moved last

Nothing else is touched or read, whatever else lies there. A name is the last thing that a checkpoint gets and the first
that it loses, so no death of a process leaves half of one under a name.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_STEP = re.compile(r"step-(\d{8}|[1-9]\d{8,})")
_UNFINISHED = re.compile(r"step-\d{8,}\.(part|old)")


def home(folder: Path) -> Path:
    """Where a run folder has its checkpoints."""
    return folder / "checkpoints"


def named(folder: Path, step: int, suffix: str = "") -> Path:
    """The folder of the checkpoint of a step."""
    return home(folder) / f"step-{step:08d}{suffix}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    entries = home(folder).iterdir() if home(folder).is_dir() else ()
    return sorted((path for path in entries if _STEP.fullmatch(path.name) and path.is_dir()), key=step_of)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder."""
    return next(reversed(complete(folder)), None)


def clear_unfinished(folder: Path) -> None:
    """Delete what killed runs left half-written or half-deleted."""
    for path in home(folder).iterdir() if home(folder).is_dir() else ():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)


def publish_step(folder: Path, step: int) -> Path:
    """Rename the finished checkpoint of a step to its final name, and let `latest` point to it. Returns its folder."""
    target = named(folder, step)
    # One of the same step is there if a run went on from an older one.
    _discard(target)
    named(folder, step, ".part").rename(target)
    point_to(target)
    return target


def point_to(target: Path) -> None:
    """Let `latest` point to a checkpoint."""
    link = target.parent / "latest.part"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    os.replace(link, target.parent / "latest")
    sync_folder(target.parent)


def prune(folder: Path, last: int, every: int | None) -> None:
    """Delete all checkpoints but the newest `last` and those of steps that `every` divides."""
    for path in complete(folder)[:-last]:
        if every is None or step_of(path) % every:
            _discard(path)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing reads or counts it again. Returns its new path."""
    aside = path.with_name(path.name + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    return path.rename(aside)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _discard(path: Path) -> None:
    if path.exists():
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        shutil.rmtree(old)
