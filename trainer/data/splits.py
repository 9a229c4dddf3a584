"""Both splits of a run's dataset, opened before any process group exists: a missing dataset then costs no GPU time."""

from __future__ import annotations

from dataclasses import dataclass

from dryvine.trainer.config import Config
from dryvine.trainer.data.identity import UNKNOWN, DataIdentity, identify
from dryvine.trainer.data.prepare import prepare
from dryvine.trainer.data.source import TokenSource


@dataclass(frozen=True)
class Data:
    train: TokenSource
    val: TokenSource
    identity: DataIdentity = UNKNOWN


def open_data(config: Config) -> Data:
    """Open both splits of `data.source`; the embedded corpus is built first if need be. Raises DataError."""
    folder = prepare(config.data)
    # The next token of each position, and one more for each depth of multi-token prediction.
    extra = 1 + config.model.mtp_depth
    train, val = (TokenSource(folder, s, config.data.seq_len, extra, config.run.seed) for s in ("train", "val"))
    return Data(train, val, identify((train.packed, val.packed), train.packed.dataset.tokenizer_sha256))
