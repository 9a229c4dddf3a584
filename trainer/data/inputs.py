"""Which files a dataset is made of, in which order: patterns of the user's, or the embedded corpus.

The embedded corpus is the source of the running Python's own standard library: real text (code, and English in its
docstrings and `pydoc_data`) that every machine has, so that nothing is downloaded. Left out is what one distribution
ships and another does not, so that vocabulary and losses compare between machines: tests, the Tk programs, and what
was generated for one machine (a Debian and a python.org 3.11 then have the same files). Also left out are the tables
of `encodings`, which are not text, and whatever is installed besides.
"""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.readers import kind_of

_NOT_EVERYWHERE = {"test", "tests", "idlelib", "tkinter", "turtledemo", "macholib"}
_LEFT_OUT = _NOT_EVERYWHERE | {"encodings", "site-packages", "dist-packages", "__pycache__"}
_OF_ONE_MACHINE = ("_sysconfigdata", "sitecustomize", "_distutils_system_mod")


class Input(NamedTuple):
    """`name` is the path below the inputs' common folder: the same wherever the inputs lie."""

    path: Path
    name: str
    size: int


def match(patterns: Sequence[str]) -> list[Input]:
    """The files that the patterns (`**` allowed) match: by pattern, then by path, each once.

    Raises DataError for a pattern that matches nothing, or a file that no reader is for.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        found = sorted(Path(p).absolute() for p in glob.glob(os.path.expanduser(pattern), recursive=True))
        files = [path for path in found if path.is_file()]
        if not files:
            raise DataError(f"--text {pattern!r}: matches no file; quote the pattern and check the path")
        paths |= dict.fromkeys(files)
    for path in paths:
        kind_of(path)
    root = os.path.commonpath([path.parent for path in paths])
    return [Input(path, path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]


def stdlib() -> list[Input]:
    """The embedded corpus, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [Input(path, path.relative_to(root).as_posix(), path.stat().st_size) for path in _python_files(root)]
    return sorted(found, key=lambda file: file.name)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT and not name.startswith("config-")]
        yield from (Path(folder) / f for f in files if f.endswith(".py") and not f.startswith(_OF_ONE_MACHINE))
