"""How conversations become tokens: the table `chat` of `[sft]` and of `[rl]`, which must agree for a model that goes
from one to the other. Imports no torch."""

from __future__ import annotations

import json

from pydantic import BaseModel, Field, model_validator


class ChatConfig(BaseModel, frozen=True, extra="forbid"):
    """`roles` maps a role to what is written around its content, which stands where {content} is. A token of the
    tokenizer that is spelled out there is that token; contents are plain text, except for `controls`."""

    tokenizer: str = Field(description="a tokenizer.json")
    roles: dict[str, str] = {
        "system": "{content}",
        "user": "<|User|>{content}<|Assistant|>",
        "assistant": "{content}<|endoftext|>",
    }
    answers: str = Field(default="assistant", description="the role whose content, and what follows it, is learnt")
    controls: tuple[str, ...] = Field(
        default=(), description='control tokens that the role `answers` may spell in its content, such as "<think>"'
    )

    def jinja(self) -> str:
        """The same templates as a Jinja chat template, for transformers and for servers."""
        parts = {role: text.split("{content}") for role, text in self.roles.items()}
        turns = "".join(
            f"{{% if message['role'] == {json.dumps(role)} %}}{{{{ {json.dumps(before)} + message['content'] + "
            f"{json.dumps(after)} }}}}{{% endif %}}"
            for role, (before, after) in parts.items()
        )
        opening = json.dumps(parts[self.answers][0])
        return (
            f"{{% for message in messages %}}{turns}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {opening} }}}}{{% endif %}}"
        )

    @model_validator(mode="after")
    def _templates_hold_content(self) -> ChatConfig:
        for role, template in self.roles.items():
            if template.count("{content}") != 1:
                raise ValueError(f"roles.{role} = {template!r}: must hold {{content}} once")
        if self.answers not in self.roles:
            raise ValueError(f"answers = {self.answers!r} is no role; there are {', '.join(self.roles)}")
        return self
