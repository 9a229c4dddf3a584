"""The data of a run of any of the three kinds: packed text, conversations, or the questions of an RL task."""

from __future__ import annotations

from dryvine.trainer.config import Config
from dryvine.trainer.data.identity import DataIdentity
from dryvine.trainer.data.splits import Data, open_data
from dryvine.trainer.rl.conversations import open_conversations
from dryvine.trainer.rl.prompt_source import PromptSource
from dryvine.trainer.rl.questions import open_task


def open_sources(config: Config) -> Data:
    """Open the data that the config names. Raises DataError, and ConfigError for a task."""
    if config.sft:
        return open_conversations(config)
    if config.rl:
        task = open_task(config)
        asked = PromptSource(task, config.data.seq_len + 1 + config.model.mtp_depth)
        return Data(asked, asked, DataIdentity(None, task.chat.vocabulary.sha256))
    return open_data(config)
