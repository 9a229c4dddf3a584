"""Which files a dataset is built from, and in which order."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import is_written_by_build
from dryvine.trainer.data.hub import HUB, fetch
from dryvine.trainer.data.readers.table import kind_of


class Input(NamedTuple):
    """An input file. `name` is its path below the common folder of all inputs: the same wherever the inputs lie."""

    path: Path
    name: str
    size: int  # bytes on disk


def printable(name: str) -> str:
    """A file name for a person or a file of UTF-8: bytes that are not UTF-8 are spelled \\udcXX."""
    return name.encode(errors="backslashreplace").decode()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which reads an input, into a DataError with its name."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}; fix that, and run the same command again, which goes on from the last "
            "whole shard"
        ) from None


def input_below(root: Path, path: Path) -> Input:
    return Input(path, path.relative_to(root).as_posix(), path.stat().st_size)


def match_files(patterns: Sequence[str]) -> list[Input]:
    """The files that the patterns (`**` allowed) match: by pattern, then by path. Files that a build wrote never match.

    Each file comes once, however many paths lead to it. Raises DataError for a pattern that matches nothing, or a file
    without a reader.
    """
    paths: dict[tuple[int, int], Path] = {}
    for asked, pattern in _listed(patterns):
        matches = _match(pattern)
        if not matches:
            is_folder = os.path.isdir(os.path.expanduser(pattern))
            fix = f"name its files, as in '{asked}/**/*.jsonl'" if is_folder else "quote the pattern and check the path"
            raise DataError(f"--text {asked!r}: matches no file; {fix}")
        paths |= {identity: path for identity, path in matches.items() if identity not in paths}
    for path in paths.values():
        kind_of(path)
    root = Path(os.path.commonpath([path.parent for path in paths.values()]))
    return [input_below(root, path) for path in paths.values()]


def _listed(patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The patterns, each as asked for and as matched here. `@FILE` is replaced by the lines of that file; relative ones
    are below its folder. Files of the hub are downloaded first."""
    for pattern in patterns:
        if pattern.startswith(HUB):
            yield pattern, fetch(pattern)
        elif not pattern.startswith("@"):
            yield pattern, pattern
        else:
            index = Path(pattern[1:]).expanduser()
            try:
                lines = index.read_bytes().splitlines()
            except OSError as error:
                raise DataError(f"--text {pattern!r}: {error.strerror}; name a file with a path on each line") from None
            names = (os.fsdecode(line.strip()) for line in lines)
            paths = [str(index.parent / name) for name in names if name and not name.startswith("#")]
            yield from zip(paths, paths, strict=True)


def _match(pattern: str) -> dict[tuple[int, int], Path]:
    """The files that match a pattern, by path. Of several paths to one file, a real one wins, then a short one."""
    matches = {Path(path).absolute() for path in _expand("", Path(os.path.expanduser(pattern)).parts)}
    files = [path for path in matches if path.is_file() and not is_written_by_build(path)]
    best: dict[tuple[int, int], Path] = {}
    for path in sorted(files, key=lambda path: (path.is_symlink(), len(path.parts), path)):
        best.setdefault(_identity(path), path)
    return dict(sorted(best.items(), key=lambda entry: entry[1]))


def _identity(path: str | Path) -> tuple[int, int]:
    """Device and inode: the same for all paths that lead to a file or folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _expand(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """The paths in a folder that match a pattern given by its parts. `glob` would follow loops of links in a `**`."""
    if not parts:
        yield folder
        return
    head, *rest = parts
    if head == "**":
        names, rest = _folders_below(folder), rest or ["*"]
    elif not set(head) & set("*?") and os.path.lexists(os.path.join(folder, head)):
        names = [head]  # an existing file called part[1].txt
    else:
        names = glob.glob(head, root_dir=folder)
    for name in names:
        yield from _expand(os.path.join(folder, name), rest)


def _folders_below(top: str) -> list[str]:
    """The folder itself and all folders below it, each once; links are followed last, so that real paths win."""
    seen: set[tuple[int, int]] = set()
    names, queue = [], deque([""])
    while queue:
        name = queue.popleft()
        folder = os.path.join(top, name)
        if (identity := _identity(folder or ".")) in seen:
            continue
        seen.add(identity)
        names.append(name)
        for below in sorted(glob.glob("*/", root_dir=folder)):
            path = os.path.join(name, below.rstrip("/"))
            (queue.append if os.path.islink(os.path.join(top, path)) else queue.appendleft)(path)
    return names
