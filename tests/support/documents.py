"""Documents of a few tokens each: packed into sequences, and as datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dryvine.trainer.model.documents import Documents, documents_of, same_document
from tests.support.datasets import write_dataset

LENGTHS = ((5, 1, 9, 3, 6), (24,), (1,) * 4 + (20,), (13, 11))  # of the documents of a sequence of 24 tokens


def numbers_of(*sequences: tuple[int, ...], extra: int) -> np.ndarray:
    """Document numbers of sequences made of documents of these lengths; the last goes on."""
    rows = [np.repeat(np.arange(len(lengths)), lengths) for lengths in sequences]
    return np.stack([np.append(row, [row[-1]] * extra) for row in rows])


def plain_documents(*sequences: tuple[int, ...], depth: int = 0, device: str = "cpu") -> Documents:
    numbers = numbers_of(*sequences, extra=1 + depth)
    inside = [same_document(numbers, ahead, 1 + depth) for ahead in range(1, 2 + depth)]
    return documents_of(numbers, [same.astype(np.float32) for same in inside], device)


def short_documents(folder: Path) -> Path:
    """A dataset of 9000 tokens in about 1200 documents; its validation split is the training split."""
    draw = np.random.default_rng(0)
    write_dataset(folder, [9000], vocab_size=320)
    ends = np.unique(np.append(draw.integers(1, 9000, 1200), 9000)).astype(np.uint64)
    np.save(folder / "train" / "00000.ends.npy", ends)
    (folder / "val").symlink_to(folder / "train")
    described = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(described | {"val": described["train"]}))
    return folder
