"""Safetensors files, read and written a slice at a time: a length, a JSON header and the bytes.

The safetensors library maps a file and checks its header, but does not tell where a tensor lies, so no slice could be
written in place, and its messages name no key. Its writer, and torch's `distributed.checkpoint.hf_storage`, need every
tensor of a file in memory. Here a file is laid out first, with all of its disk space allocated at once, and then filled
in any order. Reads copy the requested bytes and never map a file, which somebody may truncate meanwhile.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.trainer.checkpoint.files import encoded_header
from dryvine.trainer.hand_off.errors import HandOffError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes: the library's limit


class Entry(NamedTuple):
    """A tensor in a file, and the byte at which it begins."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name. Raises HandOffError naming the file, and the key, of whatever the format does not
    allow: every byte after the header must belong to one tensor."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise HandOffError(f"{path}: not a safetensors file: its header would be {length} bytes of {size}")
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise HandOffError(f"{path}: {error.strerror}") from None
    except HandOffError:
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, too deep
        raise HandOffError(f"{path}: the header is not JSON: {_short(error)}") from None
    if not isinstance(header, dict):
        raise HandOffError(f"{path}: the header is not a JSON object")
    return _checked(path, {key: value for key, value in header.items() if key != "__metadata__"}, 8 + length, size)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _checked(path: Path, header: Mapping[str, object], start: int, size: int) -> dict[str, Entry]:
    entries, spans = {}, []
    for name, described in header.items():
        dtype, shape, begin, end = _described(path, name, described)
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise HandOffError(f"{path}: {name}: {end - begin} bytes do not make a {dtype} of shape {list(shape)}")
        entries[name] = Entry(path, name, dtype, shape, start + begin)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise HandOffError(f"{path}: {name}: begins at byte {begin} of the data, and the one before ends at {at}")
        at = end
    if start + at != size:
        raise HandOffError(f"{path}: holds {size - start} bytes of data, and its header describes {at}: cut short?")
    return entries


def _described(path: Path, name: str, described: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    match described:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]} if code in DTYPES:
            numbers = (*shape, begin, end)
            if all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) and begin <= end:
                return DTYPES[code], tuple(shape), begin, end
    raise HandOffError(f"{path}: {name}: not described by a known dtype, a shape and data_offsets")


def read(entry: Entry, first: int = 0, count: int | None = None) -> Tensor:
    """Elements first..first+count of a tensor, flat, in its dtype; all of them by default."""
    count = entry.elements if count is None else count
    data = bytearray(count * entry.dtype.itemsize)
    with entry.file.open("rb") as file:
        file.seek(entry.at + first * entry.dtype.itemsize)
        if file.readinto(data) != len(data):
            raise HandOffError(f"{entry.file}: {entry.name}: the file has been cut short")
    return torch.frombuffer(data, dtype=entry.dtype) if count else torch.empty(0, dtype=entry.dtype)


class SafetensorsWriter:
    """A new file with room for all of its tensors; `write` fills it, within `with`. Raises OSError if the disk is too
    small."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        described, begins, at = {}, {}, 0
        for name, (dtype, shape) in tensors.items():
            begins[name], end = at, at + math.prod(shape) * dtype.itemsize
            described[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": (at, end)}
            at = end
        header = encoded_header({"__metadata__": {"format": "pt"}, **described})
        start = len(header)
        self._starts = {name: start + begin for name, begin in begins.items()}
        self._file = path.open("wb")
        self._file.write(header)
        self._file.flush()
        # Not every file system can allocate ahead; on those a full disk raises at a later write.
        reserve = getattr(os, "posix_fallocate", None)
        _ = reserve(self._file.fileno(), 0, start + at) if reserve else self._file.truncate(start + at)

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Elements from `first` on, in the dtype the tensor was announced with."""
        self._file.seek(self._starts[name] + first * values.dtype.itemsize)
        self._file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        """Sync the file to disk and close it."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200] or type(error).__name__
