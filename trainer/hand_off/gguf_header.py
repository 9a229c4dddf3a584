"""Reads the header of a GGUF file as untrusted input, and compares it with what an export writes.

llama.cpp aborts the process on many errors in a file, and the `gguf` library's reader trusts lengths: it returns
truncated strings, and loops over arrays of up to 2^60 elements. So a file is checked here before another program opens
it: every length must fit into the file, and every key and tensor must be the expected one.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape

from dryvine.comm.integers import round_up
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_gguf import GgufFile
from dryvine.trainer.hand_off.gguf_keys import ARCH, Key

Kind = gguf.GGUFValueType
ALIGNMENT = 32
SCALARS = {
    Kind.UINT8: "B", Kind.INT8: "b", Kind.UINT16: "H", Kind.INT16: "h", Kind.UINT32: "I", Kind.INT32: "i",
    Kind.FLOAT32: "f", Kind.BOOL: "?", Kind.UINT64: "Q", Kind.INT64: "q", Kind.FLOAT64: "d",
}  # fmt: skip


class Info(NamedTuple):
    """A tensor in the file."""

    shape: tuple[int, ...]  # as numpy has it
    type: int
    offset: int


class _Bytes:
    """Reads a file forward; its errors name what was being read."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, os.fstat(file.fileno()).st_size
        self.reading = "the first bytes"

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise HandOffError(f"{self.path}: {self.reading}: {count} bytes are more than the file has left")
        return self.file.read(count)

    def number(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return value

    def count(self, code: str = "Q") -> int:
        return int(self.number(code))

    def text(self) -> str:
        taken = self.take(self.count())
        try:
            return taken.decode()
        except UnicodeDecodeError:
            raise HandOffError(f"{self.path}: {self.reading}: not UTF-8: {taken[:40]!r}") from None

    def value(self, kind: int) -> object:
        if kind in SCALARS:
            return self.number(SCALARS[Kind(kind)])
        if kind == Kind.STRING:
            return self.text()
        if kind == Kind.ARRAY:
            of = self.count("I")
            length = self.count()
            if of == Kind.ARRAY or length > self.size:
                raise HandOffError(f"{self.path}: {self.reading}: an array of {length} of type {of}")
            return [self.value(of) for _ in range(length)]
        raise HandOffError(f"{self.path}: {self.reading}: no value has type {kind}")


def check_gguf(path: Path, expected: GgufFile) -> None:
    """Raises HandOffError naming the file and the first key or tensor that differs from the export's."""
    try:
        with path.open("rb") as file:
            read = _Bytes(file, path)
            keys, infos = _header(read)
            start = round_up(file.tell(), ALIGNMENT)
            left = read.size - start
    except OSError as error:
        raise HandOffError(f"{path}: {error.strerror}") from None
    wanted = {key.name: key for key in [Key("general.architecture", ARCH, Kind.STRING), *expected.keys]}
    for name in wanted.keys() | keys.keys():
        if name not in keys or name not in wanted or not _same(keys[name], wanted[name]):
            found = f"is {_short(keys[name][1])}" if name in keys else "is missing"
            should = _short(wanted[name].value) if name in wanted else "nothing"
            raise HandOffError(f"{path}: {name}: {found}, and should be {should}")
    for wrong in _wrong_tensors(infos, expected, left):
        raise HandOffError(f"{path}: {wrong}")


def _header(read: _Bytes) -> tuple[dict[str, tuple[int, object]], dict[str, Info]]:
    if read.take(4) != b"GGUF" or read.count("I") != gguf.GGUF_VERSION:
        raise HandOffError(f"{read.path}: not a GGUF file of version {gguf.GGUF_VERSION}")
    read.reading = "the number of tensors"
    tensors, pairs = read.count(), read.count()
    if max(tensors, pairs) > read.size:
        raise HandOffError(f"{read.path}: claims {tensors} tensors and {pairs} keys, in {read.size} bytes")
    keys: dict[str, tuple[int, object]] = {}
    for number in range(pairs):
        read.reading = f"key number {number}"
        name = read.reading = read.text()
        kind = read.count("I")
        if name in keys:
            raise HandOffError(f"{read.path}: {_short(name)} is there twice")
        keys[name] = kind, read.value(kind)
    infos: dict[str, Info] = {}
    for number in range(tensors):
        read.reading = f"tensor number {number}"
        name = read.reading = read.text()
        dimensions = read.count("I")
        if name in infos or dimensions > 4:
            raise HandOffError(f"{read.path}: {_short(name)} is there twice, or has {dimensions} dimensions")
        shape = tuple(read.count() for _ in range(dimensions))
        infos[name] = Info(shape[::-1], read.count("I"), read.count())
    return keys, infos


def _same(found: tuple[int, object], wanted: Key) -> bool:
    kind, value = found
    if kind != wanted.type:
        return False
    if kind == Kind.FLOAT32:
        return np.float32(value) == np.float32(wanted.value)  # type: ignore[arg-type]
    return bool(value == wanted.value)


def _wrong_tensors(infos: dict[str, Info], expected: GgufFile, left: int) -> Iterator[str]:
    """A message for each tensor that is not as expected."""
    at = 0
    for tensor in expected.tensors:
        info, wanted = infos.pop(tensor.name, None), Info(tensor.shape, int(tensor.type), at)
        if info != wanted:
            yield f"{tensor.name}: is {_info(info)}, and should be {_info(wanted)}"
        size = math.prod(quant_shape_to_byte_shape(tensor.shape, tensor.type))
        at += round_up(size, ALIGNMENT)
    for name in infos:
        yield f"{_short(name)}: nothing of this model"
    if at != left:
        yield f"holds {left} bytes of data, and its tensors are {at}: cut short?"


def _info(info: Info | None) -> str:
    return "missing" if info is None else f"type {info.type} of {list(info.shape)} at byte {info.offset}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
