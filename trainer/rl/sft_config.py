"""What a fine-tuning run reads: the `[sft]` table. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from dryvine.trainer.rl.chat_config import ChatConfig


class SFTConfig(BaseModel, frozen=True, extra="forbid"):
    """Conversations, a JSON object a line: {"messages": [{"role": "user", "content": "..."}, ...]}."""

    train: str = Field(description="a .jsonl file")
    validation: str = Field(description="a .jsonl file; what it holds is not trained on")
    chat: ChatConfig
    # A line that is no conversation of these roles, or has nothing to learn, or does not fit into data.seq_len: end the
    # run before it begins, or leave the line out and say how many.
    bad_lines: Literal["refuse", "skip"] = "refuse"
    max_skipped: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="of the lines; with more the run is refused, whatever bad_lines says"
    )
