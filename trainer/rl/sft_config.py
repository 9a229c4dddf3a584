"""The `[sft]` table: fine-tuning on conversations. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, Field

from dryvine.trainer.rl.chat_config import ChatConfig


class SFTConfig(BaseModel, frozen=True, extra="forbid"):
    """Conversations, a JSON object a line: {"messages": [{"role": "user", "content": "..."}, ...]}."""

    train: str = Field(description="a .jsonl file")
    validation: str = Field(description="a .jsonl file; what it holds is not trained on")
    chat: ChatConfig
