"""Datasets of tokens that count up."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dryvine.trainer.data.dataset import Dataset, Shard, Split, dtype_for


def write_dataset(folder: Path, shards: list[int], vocab_size: int = 300) -> np.ndarray:
    """A dataset whose training tokens count up from 0, modulo the vocabulary, with empty validation."""
    dtype = dtype_for(vocab_size)
    line = (np.arange(sum(shards)) % vocab_size).astype(dtype)
    (folder / "train").mkdir(parents=True)
    entries, start = [], 0
    for number, tokens in enumerate(shards):
        shard = Shard(name=f"{number:05d}", tokens=tokens, documents=1)
        line[start : start + tokens].tofile(shard.bin(folder / "train"))
        np.save(shard.ends(folder / "train"), np.array([tokens], np.uint64))
        entries.append(shard)
        start += tokens
    dataset = Dataset(
        fingerprint="0",
        tokenizer_sha256="0",
        vocab_size=vocab_size,
        end_token=0,
        dtype=dtype,
        recipe={},
        quarantined=0,
        train=Split(shards=tuple(entries), bytes=1),
        val=Split(),
    )
    (folder / "dataset.json").write_text(dataset.model_dump_json())
    return line
