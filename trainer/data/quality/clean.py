"""Finds copies and quotes in a dataset, and writes the dataset without them as a new folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field
from tokenizers import Tokenizer

from dryvine.trainer.data.atomic import write_atomically
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import Dataset, Split, SplitName
from dryvine.trainer.data.encoded import Encoded
from dryvine.trainer.data.quality.copies import find_copies
from dryvine.trainer.data.quality.documents import DocumentPlace, Repeat, SplitDocuments, splits_of
from dryvine.trainer.data.quality.quotes import find_quoted
from dryvine.trainer.data.shards import SPLITS, ShardWriter
from dryvine.trainer.data.spec import OnProgress, no_progress
from dryvine.trainer.data.stream import StreamPosition


class CleanSpec(BaseModel, frozen=True, extra="forbid"):
    """What counts as a copy or a quote."""

    similarity: float = Field(default=0.8, ge=0.1, le=0.95)  # Jaccard, of 5-grams of tokens
    ngram: int = Field(default=13, gt=0)  # tokens
    quoted: float = Field(default=0.5, gt=0, le=1)  # share of a validation document's n-grams


def find_repeats(folder: Path, spec: CleanSpec, on_progress: OnProgress = no_progress) -> list[Repeat]:
    """The copies and quotes of a dataset. Quotes by training documents that are copies themselves do not count."""
    splits = splits_of(folder)
    count = sum(map(len, splits.values()))
    found = list(find_copies(splits, spec.similarity, lambda done: on_progress("looking for copies", done, count)))
    copies = {repeat.place for repeat in found}
    train = len(splits["train"])
    quotes = find_quoted(
        splits, spec.ngram, spec.quoted, copies, lambda done: on_progress("looking for quotes", done, train)
    )
    return [*found, *quotes]


def write_clean(folder: Path, out: Path, spec: CleanSpec, repeats: Sequence[Repeat]) -> Dataset:
    """Write the dataset without `repeats` into `out`, and list them in `out`/dropped.jsonl. Raises DataError if
    `out` is not empty."""
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: not empty; name a new folder with --out, or delete it")
    before, dropped = Dataset.load(folder), {repeat.place for repeat in repeats}
    out.mkdir(parents=True, exist_ok=True)
    for name in ("inputs.json", "tokenizer.json", "quarantine.jsonl"):
        shutil.copyfile(folder / name, out / name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    train, val = (_copy(SplitDocuments(folder, split), out, dropped, tokenizer) for split in SPLITS)
    settings = json.dumps([before.fingerprint, spec.model_dump()])
    after = before.model_copy(
        update={
            "fingerprint": hashlib.sha256(settings.encode()).hexdigest()[:16],
            "recipe": before.recipe | {f"dedup_{name}": value for name, value in spec.model_dump().items()},
            "train": train,
            "val": val,
        }
    )
    write_atomically(out / "dropped.jsonl", "".join(json.dumps(described(repeat)) + "\n" for repeat in repeats))
    write_atomically(out / "dataset.json", after.model_dump_json(indent=1))
    return after


def described(repeat: Repeat) -> dict[str, object]:
    """A repeat as a row of dropped.jsonl; documents are numbered in the dataset that was searched."""
    row: dict[str, object] = {"split": repeat.place.split, "document": repeat.place.number, "tokens": repeat.tokens}
    of = {"of_split": repeat.of.split, "of_document": repeat.of.number} if repeat.of else {}
    return row | {"what": repeat.what, "share": round(repeat.share, 4)} | of


def _copy(documents: SplitDocuments, out: Path, dropped: Collection[DocumentPlace], tokenizer: Tokenizer) -> Split:
    packed, number = documents.packed, 0
    written = Split(bytes=packed.dataset.split(documents.split).bytes)
    for part, shard in enumerate(packed.shards):
        writer = ShardWriter(out / documents.split, part)
        # A document belongs to the shard in which it ends.
        for place in (DocumentPlace(documents.split, n) for n in range(number, number + shard.documents)):
            ids = documents.tokens(place.number)
            if place in dropped:
                written = written.model_copy(update={"bytes": written.bytes - _bytes_of(ids.tolist(), tokenizer)})
            else:
                writer.add(_item(np.append(ids, ids.dtype.type(packed.dataset.end_token)), documents.split))
        written, number = writer.close(written), number + shard.documents
    return written


def _item(ids: np.ndarray, split: SplitName) -> Encoded:
    return Encoded(StreamPosition(), "", (), ids, size=0, ends=True, held_out=split == "val")


def _bytes_of(ids: list[int], tokenizer: Tokenizer) -> int:
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode())
