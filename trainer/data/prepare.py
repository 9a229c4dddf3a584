"""From a run's `[data]` table to a finished dataset folder: the first call of every rank.

The embedded corpus is built on first use into a folder named by its fingerprint, so another Python, vocabulary or
format gets another folder: nothing is rebuilt under a run that reads it, and no user's data is deleted.
"""

from __future__ import annotations

from pathlib import Path

from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import STDLIB, DataConfig, DataError
from dryvine.trainer.data.dataset import Dataset
from dryvine.trainer.data.megatron import megatron_prefix
from dryvine.trainer.data.spec import BuildSpec, OnProgress, fingerprint, no_progress
from dryvine.trainer.data.stdlib import stdlib_files


def prepare(
    config: DataConfig, source: str | None = None, on_progress: OnProgress = no_progress, deadline: float = 600
) -> Path:
    """The folder of a source, `config.source` by default; the embedded corpus is built if needed. Any number of ranks
    may call it at once.

    One rank builds and the others wait, up to `deadline` seconds. Raises DataError if there is no dataset, or if its
    vocabulary does not fit into `config.vocab_size`. Ranks on hosts without a common file system each get their own;
    `Dataset.load(folder).fingerprint` and `.tokenizer_sha256` tell whether they read the same.
    """
    source = source or config.source
    folder = _embedded(config, on_progress, deadline) if source == STDLIB else Path(source)
    if megatron_prefix(folder):
        return folder
    dataset = Dataset.load(folder)
    if dataset.vocab_size > config.vocab_size:
        raise DataError(
            f"data.vocab_size = {config.vocab_size}: the dataset in {folder} has {dataset.vocab_size} token ids; "
            f"set data.vocab_size = {dataset.vocab_size} or more"
        )
    return folder


def _embedded(config: DataConfig, on_progress: OnProgress, deadline: float) -> Path:
    inputs = stdlib_files()
    spec = BuildSpec(
        vocab_size=config.vocab_size, validation_fraction=config.validation_fraction, fim_rate=config.fim_rate
    )
    folder = config.dir / fingerprint(inputs, spec)
    build(inputs, spec, folder, on_progress, deadline)
    return folder
