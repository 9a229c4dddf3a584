"""Writing shards so that a kill at any instant leaves nothing half-written under a final name.

A part is one shard of each split, one stretch of quarantine.jsonl, and then, last, a new `progress.json` that counts
them in. Whatever a killed build wrote after that is not in `progress.json`: shards are written over by the next run,
the quarantine is cut back to the length that was counted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from pydantic import BaseModel

from dryvine.trainer.data.dataset import Shard, Split, SplitName
from dryvine.trainer.data.stream import Item, Place

SPLITS: tuple[SplitName, SplitName] = ("train", "val")


class Progress(BaseModel, frozen=True, extra="forbid"):
    """`progress.json`: what is safely in the folder, and where reading goes on."""

    fingerprint: str
    part: int = 0
    place: Place = Place()
    train: Split = Split()
    val: Split = Split()
    quarantined: int = 0
    quarantine_bytes: int = 0


def publish(file: BinaryIO, path: Path) -> None:
    """Give a finished temporary file its name: even after a crash of the machine it holds all of it or nothing."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)


def temporary(path: Path) -> BinaryIO:
    return path.with_name(path.name + ".tmp").open("wb")


def write_whole(path: Path, content: str) -> None:
    file = temporary(path)
    file.write(content.encode())
    publish(file, path)


class ShardWriter:
    """One shard of one split, being written."""

    def __init__(self, folder: Path, part: int, dtype: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.name, self.dtype = folder, f"{part:05d}", dtype
        self.tokens, self.bytes = 0, 0
        self._ends: list[int] = []
        self.file = temporary(folder / f"{self.name}.bin")

    def add(self, ids: list[int], size: int, ends: bool) -> None:
        np.array(ids, self.dtype).tofile(self.file)
        self.tokens, self.bytes = self.tokens + len(ids), self.bytes + size
        if ends:
            self._ends.append(self.tokens)

    def close(self, before: Split) -> Split:
        """The split with this shard; an empty one is dropped, since nothing of no bytes can be mapped."""
        if not self.tokens:
            self.file.close()
            os.unlink(self.file.name)
            return before
        shard = Shard(name=self.name, tokens=self.tokens, documents=len(self._ends))
        publish(self.file, shard.bin(self.folder))
        ends = temporary(shard.ends(self.folder))
        np.save(ends, np.array(self._ends, np.uint64))
        publish(ends, shard.ends(self.folder))
        return Split(shards=(*before.shards, shard), bytes=before.bytes + self.bytes)


class Part:
    """The next shard of both splits, and the lines skipped meanwhile."""

    def __init__(self, out: Path, progress: Progress, dtype: str) -> None:
        self.out, self.before = out, progress
        self.train, self.val = (ShardWriter(out / split, progress.part, dtype) for split in SPLITS)
        self.quarantined = 0
        self._quarantine = (out / "quarantine.jsonl").open("ab")
        self._quarantine.truncate(progress.quarantine_bytes)
        self._quarantine.seek(progress.quarantine_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close what is still open: all of it if the part was not committed, and then the next run writes it anew."""
        for file in (self.train.file, self.val.file, self._quarantine):
            file.close()

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.val.tokens

    def skip(self, item: Item) -> None:
        for line, reason in item.record.broken:
            entry = {"file": item.name, "line": line, "reason": reason}
            self._quarantine.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self.quarantined += 1

    def commit(self, place: Place) -> Progress:
        """Close everything; from here on a killed build goes on at `place`."""
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        length = self._quarantine.tell()
        self._quarantine.close()
        progress = Progress(
            fingerprint=self.before.fingerprint,
            part=self.before.part + 1,
            place=place,
            train=self.train.close(self.before.train),
            val=self.val.close(self.before.val),
            quarantined=self.before.quarantined + self.quarantined,
            quarantine_bytes=length,
        )
        write_whole(self.out / "progress.json", progress.model_dump_json())
        return progress
