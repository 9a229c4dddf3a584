"""Datasets of documents of a few tokens each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.trainer.test_data_order import write_dataset


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
