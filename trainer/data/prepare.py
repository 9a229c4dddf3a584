"""From a run's `[data]` table to a dataset folder that is there: what every rank calls first.

The embedded corpus is built on first use into a folder named by its fingerprint, so that another Python, vocabulary or
format gets a folder of its own: nothing is ever rebuilt under a run that reads it, and nothing of a user's is deleted.
"""

from __future__ import annotations

from pathlib import Path

from dryvine.trainer.data.build import Recipe, Tick, build, fingerprint, silent
from dryvine.trainer.data.config import STDLIB, DataConfig, DataError
from dryvine.trainer.data.dataset import Dataset
from dryvine.trainer.data.inputs import stdlib


def prepare(config: DataConfig, tick: Tick = silent, deadline: float = 600) -> Path:
    """The folder that `config` names, built if it is the embedded corpus. Any number of ranks may call it at once.

    One builds and the others wait, up to `deadline` seconds. Raises DataError if there is no dataset, or if its
    vocabulary does not fit into `config.vocab_size`. Ranks on hosts without a common file system each get their own;
    `Dataset.load(folder).fingerprint` and `.tokenizer_sha256` tell whether they read the same.
    """
    folder = _embedded(config, tick, deadline) if config.source == STDLIB else Path(config.source)
    dataset = Dataset.load(folder)
    if dataset.vocab_size > config.vocab_size:
        raise DataError(
            f"data.vocab_size = {config.vocab_size}: the dataset in {folder} has {dataset.vocab_size} token ids; "
            f"set data.vocab_size = {dataset.vocab_size} or more"
        )
    return folder


def _embedded(config: DataConfig, tick: Tick, deadline: float) -> Path:
    inputs = stdlib()
    recipe = Recipe(
        vocab_size=config.vocab_size, validation_fraction=config.validation_fraction, fim_rate=config.fim_rate
    )
    folder = config.dir / fingerprint(inputs, recipe)
    build(inputs, recipe, folder, tick, deadline)
    return folder
