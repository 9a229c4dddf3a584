"""A dataset's folder, and reading its tokens.

    dataset.json            what it is; written last, so a folder without one is not a dataset
    tokenizer.json          as `tokenizers` saves it
    inputs.json             the files that it was made of, with their sizes
    quarantine.jsonl        what was skipped: file, line, reason
    train/00000.bin         tokens, little-endian uint16 (uint32 over 65536 token ids), documents end to end
    train/00000.ends.npy    uint64 [documents]: where each ends in this shard, after its end token; val/ likewise

Shards are mapped, not read: ranks on one host share the page cache, and a dataset larger than memory costs nothing to
open. A document may run over from one shard into the next; readers see one line of tokens per split. Parquet or arrow
would store the same numbers behind a decoder, and could not be sliced at a token without it.
"""

from __future__ import annotations

import bisect
import itertools
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from dryvine.trainer.data.config import DataError

FORMAT = 1
SplitName = Literal["train", "val"]


class Shard(BaseModel, frozen=True, extra="forbid"):
    name: str
    tokens: int
    documents: int  # that end in this shard

    def bin(self, folder: Path) -> Path:
        return folder / f"{self.name}.bin"

    def ends(self, folder: Path) -> Path:
        return folder / f"{self.name}.ends.npy"


class Split(BaseModel, frozen=True, extra="forbid"):
    shards: tuple[Shard, ...] = ()
    bytes: int = 0  # of UTF-8 text, before tokenizing

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


class Dataset(BaseModel, frozen=True, extra="forbid"):
    """`dataset.json`. Ranks that read the same data have the same `fingerprint` (inputs and recipe) and tokenizer."""

    format: int = FORMAT
    fingerprint: str
    tokenizer_sha256: str
    vocab_size: int  # largest token id + 1
    end_token: int
    dtype: Literal["<u2", "<u4"]
    recipe: dict[str, str | int | float | None]
    quarantined: int
    train: Split
    val: Split

    @staticmethod
    def load(folder: Path) -> Dataset:
        """Raises DataError if the folder holds no finished dataset that this version reads."""
        try:
            return Dataset.model_validate_json((folder / "dataset.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{folder}: no finished dataset here; make one with `dryvine data build`") from None
        except ValidationError:
            raise DataError(f"{folder}: dataset.json is not of format {FORMAT}; build it anew elsewhere") from None

    def split(self, name: SplitName) -> Split:
        return self.train if name == "train" else self.val


def dtype_for(vocab_size: int) -> Literal["<u2", "<u4"]:
    """The narrowest type that holds every token id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


class PackedTokens:
    """The tokens of one split as one line, from 0 to `len`, over memory-mapped shards."""

    def __init__(self, folder: Path, split: SplitName) -> None:
        self.dataset = Dataset.load(folder)
        self.folder, self.shards = folder / split, self.dataset.split(split).shards
        self._maps = [self._map(shard) for shard in self.shards]
        self._starts = [0, *itertools.accumulate(shard.tokens for shard in self.shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _map(self, shard: Shard) -> NDArray[np.unsignedinteger]:
        path, dtype = shard.bin(self.folder), np.dtype(self.dataset.dtype)
        size = path.stat().st_size if path.exists() else 0
        if size != shard.tokens * dtype.itemsize:
            raise DataError(
                f"{path}: {size} bytes where dataset.json says {shard.tokens * dtype.itemsize}; copy or build it again"
            )
        return np.memmap(path, dtype, mode="r")

    def tokens(self, start: int, length: int) -> NDArray[np.unsignedinteger]:
        """`length` tokens from `start`, [length], in the stored dtype; across shard edges they are copied together."""
        if start < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        parts, shard = [], bisect.bisect_right(self._starts, start) - 1
        while length > 0:
            inside = start - self._starts[shard]
            parts.append(self._maps[shard][inside : inside + length])
            start, length, shard = start + parts[-1].size, length - parts[-1].size, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, self.dataset.dtype)])

    def document_ends(self) -> NDArray[np.uint64]:
        """Where each document ends on the line, after its end token: uint64 [documents], ascending."""
        ends = [
            np.load(shard.ends(self.folder)) + np.uint64(start)
            for shard, start in zip(self.shards, self._starts, strict=False)
        ]
        return np.concatenate([np.empty(0, np.uint64), *ends])
