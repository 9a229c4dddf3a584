"""What a run reads, whichever of its three kinds it is: packed text, conversations, or nothing but what it samples."""

from __future__ import annotations

from dryvine.trainer.config import Config
from dryvine.trainer.data.splits import Data, open_data
from dryvine.trainer.rl.blank import Blank
from dryvine.trainer.rl.conversations import open_conversations


def open_sources(config: Config) -> Data:
    """Raises DataError."""
    if config.sft:
        return open_conversations(config)
    if config.rl:
        blank = Blank(config.data.seq_len + 1 + config.model.mtp_depth)
        return Data(blank, blank)
    return open_data(config)
