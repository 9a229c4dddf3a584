"""Megatron's .bin/.idx: a prefix read in place as a data source, and a dataset written as one.

    PREFIX.bin    tokens, documents end to end
    PREFIX.idx    b"MMIDIDX\\0\\0", uint64 1, uint8 type of a token, uint64 sequences, uint64 document indices, then
                  int32 [sequences] lengths, int64 [sequences] byte offsets, int64 [indices] first sequence of each
                  document and, last, the number of sequences

Both are mapped, not read, so a prefix of terabytes opens at once. The files say nothing of a tokenizer, and have one
split: the last `data.validation_fraction` of the documents is held out, so that both stay stretches of one line.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.data.atomic import append, open_temporary, rename_into_place
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import SplitName
from dryvine.trainer.data.packed_tokens import PackedTokens

_MAGIC, _HEADER = b"MMIDIDX\0\0", struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_COPY_TOKENS = 2**24


def megatron_prefix(source: str | Path) -> Path | None:
    """The prefix of a .bin/.idx pair that a source names, with or without a suffix; None if it names none."""
    path = Path(source)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return prefix if _with(prefix, ".idx").is_file() and _with(prefix, ".bin").is_file() else None


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


class MegatronTokens:
    """One split of a prefix as a line of tokens, from 0 to `len`, as `PackedTokens` is one of a folder. Raises
    DataError for files that are damaged, hold no integers, or whose documents are not end to end."""

    def __init__(self, prefix: Path, split: SplitName, held_out: float, vocab_size: int | None = None) -> None:
        self.prefix, self.vocab_size = prefix, vocab_size
        lengths, offsets, first = _read_index(_with(prefix, ".idx"))
        self._bin = self._map(lengths, offsets)
        # Token places where documents end: after the last sequence of each.
        places = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._ends = places[first[1:]]
        border = len(self._ends) - int(len(self._ends) * held_out)
        edge = int(self._ends[border - 1]) if border else 0
        self._start, self._stop = (0, edge) if split == "train" else (edge, len(self._bin))

    def _map(self, lengths: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.integer]:
        path, dtype = _with(self.prefix, ".bin"), np.dtype(_type_of(_with(self.prefix, ".idx")))
        ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
        if (offsets != np.concatenate([[0], ends[:-1]])).any():
            raise DataError(f"{path}: its documents do not lie end to end; write it anew with Megatron's merge tool")
        if path.stat().st_size != (size := int(ends[-1])):
            raise DataError(f"{path}: {path.stat().st_size} bytes where the .idx says {size}; copy it again")
        return np.memmap(path, dtype, mode="r")

    def __len__(self) -> int:
        return self._stop - self._start

    def tokens(self, start: int, length: int) -> NDArray[np.integer]:
        """`length` tokens from `start`, a view. Raises IndexError outside of [0, len], DataError for an id outside of
        the vocabulary."""
        if start < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        found = self._bin[self._start + start : self._start + start + length]
        if self.vocab_size and length and not 0 <= found.min() <= found.max() < self.vocab_size:
            ids = f"up to {found.max()}" if found.min() >= 0 else f"from {found.min()}"
            fix = f"set data.vocab_size above {found.max()}" if found.min() >= 0 else "write the file anew"
            raise DataError(f"{self.prefix}.bin: token ids {ids} near token {self._start + start}; {fix}")
        return found

    def ends_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """As in `PackedTokens`."""
        low, high = np.searchsorted(self._ends, (self._start + start, self._start + stop - 1), side="right")
        return self._ends[low:high] - self._start


def _type_of(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise DataError(f"{path}: not a Megatron index; --text reads jsonl, parquet and text")
    _, version, code, _, _ = _HEADER.unpack(head)
    if version != 1 or code not in _TYPES:
        raise DataError(f"{path}: version {version} with tokens of type {code}; version 1 of integers can be read")
    return _TYPES[code]


def _read_index(path: Path) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Lengths and byte offsets of the sequences, and the documents' first sequences with the end of the last."""
    _type_of(path)
    with path.open("rb") as file:
        *_, sequences, indices = _HEADER.unpack(file.read(_HEADER.size))
    needed = _HEADER.size + 12 * sequences + 8 * indices
    if path.stat().st_size < needed or not sequences:
        raise DataError(f"{path}: {path.stat().st_size} bytes for {sequences} sequences; it is cut off or empty")
    place, found = _HEADER.size, []
    for dtype, count in (("<i4", sequences), ("<i8", sequences), ("<i8", indices)):
        found.append(np.memmap(path, dtype, mode="r", offset=place, shape=(count,)))
        place += found[-1].nbytes
    return found[0], found[1], found[2]


def write_megatron(folder: Path, split: SplitName, prefix: Path) -> int:
    """Write a split of a dataset folder as PREFIX.bin and .idx, a document a sequence. Returns the number of
    documents. Tokens are uint16, or int32 for vocabularies over 65536 ids: Megatron has no uint32."""
    packed = PackedTokens(folder, split)
    code = 8 if packed.dataset.dtype == "<u2" else 4
    prefix.parent.mkdir(parents=True, exist_ok=True)
    data = open_temporary(_with(prefix, ".bin"))
    for start in range(0, len(packed), _COPY_TOKENS):
        append(data, packed.tokens(start, min(_COPY_TOKENS, len(packed) - start)).astype(_TYPES[code]).data)
    rename_into_place(data, _with(prefix, ".bin"))
    ends = packed.document_ends().astype(np.int64)
    index = open_temporary(_with(prefix, ".idx"))
    _write_index(index, code, ends)
    rename_into_place(index, _with(prefix, ".idx"))
    return len(ends)


def _write_index(file: BinaryIO, code: int, ends: NDArray[np.int64]) -> None:
    starts = np.concatenate([[0], ends[:-1]])
    append(file, _HEADER.pack(_MAGIC, 1, code, len(ends), len(ends) + 1))
    append(file, (ends - starts).astype("<i4").data)
    append(file, (starts * np.dtype(_TYPES[code]).itemsize).astype("<i8").data)
    append(file, np.arange(len(ends) + 1, dtype="<i8").data)
