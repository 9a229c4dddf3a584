"""Writes files so that a kill at any instant leaves nothing half-written under a final name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class CannotWrite(OSError):
    """A file cannot be written: one line with its name, the reason, and what to do."""

    @staticmethod
    @contextmanager
    def naming(path: Path) -> Iterator[None]:
        """Turn an OSError of the block, about `path`, into CannotWrite. One that names a file already is left."""
        try:
            yield
        except CannotWrite:
            raise
        except OSError as error:
            raise CannotWrite(f"{path}: {error.strerror or error}; fix that, and run the same command again") from None


def open_temporary(path: Path) -> BinaryIO:
    """A new temporary file beside `path`; `rename_into_place` renames it. Raises CannotWrite."""
    with CannotWrite.naming(path):
        return path.with_name(path.name + ".tmp").open("wb")


def append(file: BinaryIO, content: bytes | memoryview) -> None:
    """Write to a temporary file, arrays as their `data`: `ndarray.tofile` and `np.save` to a file lose what does not
    fit on a full disk, and say nothing. Raises CannotWrite."""
    with _writing(file, Path(file.name.removesuffix(".tmp"))):
        file.write(content)


def rename_into_place(file: BinaryIO, path: Path) -> None:
    """Close a temporary file and rename it to `path`. After a crash of the system, `path` is whole or not there.
    Raises CannotWrite."""
    with _writing(file, path):
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(file.name, path)


@contextmanager
def _writing(file: BinaryIO, path: Path) -> Iterator[None]:
    """Close the file if it cannot be written."""
    try:
        with CannotWrite.naming(path):
            yield
    except CannotWrite:
        with suppress(OSError):  # again, for what is left in its buffer
            file.close()
        raise


def write_atomically(path: Path, content: str) -> None:
    """Write a whole file as UTF-8. Raises CannotWrite."""
    file = open_temporary(path)
    append(file, content.encode())
    rename_into_place(file, path)
