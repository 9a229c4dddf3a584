"""Which files a dataset is built from, and in which order."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.readers.table import kind_of


class Input(NamedTuple):
    """An input file. `name` is its path below the common folder of all inputs: the same wherever the inputs lie."""

    path: Path
    name: str
    size: int  # bytes on disk


def input_below(root: Path, path: Path) -> Input:
    return Input(path, path.relative_to(root).as_posix(), path.stat().st_size)


def match_files(patterns: Sequence[str]) -> list[Input]:
    """The files that the patterns (`**` allowed) match: by pattern, then by path, each file once.

    Raises DataError for a pattern that matches nothing, or a file without a reader.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(Path(p).absolute() for p in glob.glob(os.path.expanduser(pattern), recursive=True))
        files = [path for path in matches if path.is_file()]
        if not files:
            raise DataError(f"--text {pattern!r}: matches no file; quote the pattern and check the path")
        paths |= dict.fromkeys(files)
    for path in paths:
        kind_of(path)
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return [input_below(root, path) for path in paths]
