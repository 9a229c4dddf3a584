"""A dataset's folder and what `dataset.json` in it holds.

    dataset.json            what it is; written last, so a folder without one is not a dataset
    tokenizer.json          as `tokenizers` saves it
    inputs.json             the files that it was made of, with their sizes
    quarantine.jsonl        the lines that were left out: file, line, reason
    train/00000.bin         tokens, little-endian uint16 (uint32 over 65536 token ids), documents end to end
    train/00000.ends.npy    uint64 [documents]: where each ends in this shard, after its end token; val/ likewise

Shards are memory-mapped: ranks on one host share the page cache, and opening a dataset larger than memory costs
nothing. A document may continue from one shard into the next. Parquet or arrow would store the same numbers behind a
decoder, and a window could not be sliced out of them without it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from dryvine.trainer.data.config import DataError

FORMAT = 1
SplitName = Literal["train", "val"]
_FILES = ("dataset.json", "tokenizer.json", "inputs.json", "quarantine.jsonl", "progress.json", "dropped.jsonl")
_SHARD_FILE = re.compile(r"\d+\.(bin|ends\.npy)")


class Shard(BaseModel, frozen=True, extra="forbid"):
    """A pair of files of a split."""

    name: str
    tokens: int
    documents: int  # that end in this shard

    def bin(self, folder: Path) -> Path:
        return folder / f"{self.name}.bin"

    def ends(self, folder: Path) -> Path:
        return folder / f"{self.name}.ends.npy"


class Split(BaseModel, frozen=True, extra="forbid"):
    """The training or the validation split of a dataset."""

    shards: tuple[Shard, ...] = ()
    bytes: int = 0  # of UTF-8 text, before tokenizing

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


class Dataset(BaseModel, frozen=True, extra="forbid"):
    """`dataset.json`. Ranks that read the same data have the same `fingerprint` (inputs and spec) and tokenizer."""

    format: int = FORMAT
    fingerprint: str
    tokenizer_sha256: str
    vocab_size: int  # largest token id + 1
    end_token: int
    dtype: Literal["<u2", "<u4"]
    recipe: dict[str, str | int | float | None]  # the BuildSpec
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
            raise DataError(f"{folder}: dataset.json is not of format {FORMAT}; build it again elsewhere") from None

    def split(self, name: SplitName) -> Split:
        return self.train if name == "train" else self.val


def is_written_by_build(path: Path) -> bool:
    """Whether a file belongs to a dataset, finished or not. The first files of a build stay there and identify it."""
    name = path.name.removesuffix(".tmp")
    folder = path.parent.parent if _SHARD_FILE.fullmatch(name) else path.parent
    is_ours = name in _FILES or folder != path.parent
    return is_ours and any((folder / first).exists() for first in (".lock", "inputs.json"))


def dtype_for(vocab_size: int) -> Literal["<u2", "<u4"]:
    """The narrowest dtype that holds every token id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"
