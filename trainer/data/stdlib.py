"""The embedded corpus: the source of the running Python's own standard library.

It is real text (code, and English in its docstrings and `pydoc_data`) that every machine has, so a first run downloads
nothing. Files that some distributions leave out (tests, the Tk programs) or generate for one machine are left out
everywhere, so vocabularies and losses compare between machines: a Debian and a python.org 3.11 have the same files. The
tables of `encodings` are left out because they are not text, and so is whatever is installed besides.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dryvine.trainer.data.inputs import Input, input_below

_NOT_EVERYWHERE = {"test", "tests", "idlelib", "tkinter", "turtledemo", "macholib"}
_LEFT_OUT = _NOT_EVERYWHERE | {"encodings", "site-packages", "dist-packages", "__pycache__"}
_OF_ONE_MACHINE = ("_sysconfigdata", "sitecustomize", "_distutils_system_mod")


def stdlib_files() -> list[Input]:
    """The embedded corpus, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted((input_below(root, path) for path in _python_files(root)), key=lambda file: file.name)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        # os.walk descends only into what is left in this list.
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT and not name.startswith("config-")]
        yield from (Path(folder) / f for f in files if f.endswith(".py") and not f.startswith(_OF_ONE_MACHINE))
