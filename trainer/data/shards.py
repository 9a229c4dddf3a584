"""Writes shards in parts that are committed as a whole.

A part is one shard of each split and a stretch of quarantine.jsonl. Its commit ends with a new `progress.json` that
counts them. What a killed build wrote after its last commit is not counted: the next run overwrites the shards and cuts
the quarantine back to the counted length.
"""

from __future__ import annotations

import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np

from dryvine.trainer.data.atomic import CannotWrite, append, open_temporary, rename_into_place
from dryvine.trainer.data.dataset import Shard, Split, SplitName
from dryvine.trainer.data.encoded import Encoded
from dryvine.trainer.data.progress import BuildProgress
from dryvine.trainer.data.stream import StreamPosition

SPLITS: tuple[SplitName, SplitName] = ("train", "val")


class ShardWriter:
    """Writes one shard of one split."""

    def __init__(self, folder: Path, part: int) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.name = folder, f"{part:05d}"
        self.tokens, self.bytes = 0, 0
        self._ends: list[int] = []
        self.file = open_temporary(folder / f"{self.name}.bin")

    def add(self, item: Encoded) -> None:
        """Append an item's tokens."""
        append(self.file, item.ids.data)
        self.tokens, self.bytes = self.tokens + item.ids.size, self.bytes + item.size
        if item.ends:
            self._ends.append(self.tokens)

    def close(self, before: Split) -> Split:
        """Give the shard its final name and return the split with it. An empty shard is dropped: mmap refuses an
        empty file."""
        if not self.tokens:
            self.file.close()
            os.unlink(self.file.name)
            return before
        shard = Shard(name=self.name, tokens=self.tokens, documents=len(self._ends))
        rename_into_place(self.file, shard.bin(self.folder))
        ends = open_temporary(shard.ends(self.folder))
        array = io.BytesIO()
        np.save(array, np.array(self._ends, np.uint64))
        append(ends, array.getvalue())
        rename_into_place(ends, shard.ends(self.folder))
        return Split(shards=(*before.shards, shard), bytes=before.bytes + self.bytes)


class PartWriter:
    """Writes the next shard of both splits, and the lines left out meanwhile."""

    def __init__(self, out: Path, progress: BuildProgress) -> None:
        self.out, self.before = out, progress
        self.train, self.val = (ShardWriter(out / split, progress.part) for split in SPLITS)
        self.quarantined = 0
        # Append mode with a cut: what an earlier, killed run added after its last commit goes.
        self._quarantine = (out / "quarantine.jsonl").open("ab")
        self._quarantine.truncate(progress.quarantine_bytes)
        self._quarantine.seek(progress.quarantine_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close what is still open. The next run overwrites the temporary files of a part that was not committed."""
        for file in (self.train.file, self.val.file, self._quarantine):
            with suppress(OSError):  # of a part that cannot be written, which has been said
                file.close()

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.val.tokens

    def add(self, item: Encoded) -> None:
        """Append an item's tokens to its split, and list its broken lines."""
        self._quarantine_lines(item)
        if item.ids.size:
            (self.val if item.held_out else self.train).add(item)

    def _quarantine_lines(self, item: Encoded) -> None:
        for line, reason in item.broken:
            entry = {"file": item.name, "line": line, "reason": reason}
            # A file name that is not UTF-8 has surrogates; JSON spells them \udcXX, and os.fsencode restores the bytes.
            append(self._quarantine, json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            self.quarantined += 1

    def commit(self, position: StreamPosition) -> BuildProgress:
        """Give all files their final names; a build killed after this continues at `position`."""
        with CannotWrite.naming(self.out / "quarantine.jsonl"):
            self._quarantine.flush()
            os.fsync(self._quarantine.fileno())
        length = self._quarantine.tell()
        self._quarantine.close()
        progress = BuildProgress(
            fingerprint=self.before.fingerprint,
            part=self.before.part + 1,
            place=position,
            train=self.train.close(self.before.train),
            val=self.val.close(self.before.val),
            quarantined=self.before.quarantined + self.quarantined,
            quarantine_bytes=length,
        )
        progress.save(self.out)
        return progress
