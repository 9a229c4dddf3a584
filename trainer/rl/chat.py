"""Conversations to tokens and back, by the templates of a `chat` table.

Templates and contents are encoded apart. A control token comes from a template, or from what the model itself wrote
(`controls`), and never from what a user typed: text that spells one out is encoded as plain characters. Fine-tuning and
sampling go through this one file, so that the model is asked in the tokens that it was taught.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.encoding import TextPart
from dryvine.trainer.data.tokenizer import load
from dryvine.trainer.rl.chat_config import ChatConfig
from dryvine.trainer.rl.lines import BadLine

Message = Mapping[str, str]  # role, content


class BadConversation(BadLine):
    """Messages that are not a conversation of the configured roles; says why."""


class Turns(NamedTuple):
    """A conversation's tokens, and which of them have a loss."""

    tokens: list[int]
    learnt: list[bool]


class Chat:
    """Encodes and decodes by a `chat` table. Raises DataError if the tokenizer cannot be used or lacks a token of
    `controls`."""

    def __init__(self, config: ChatConfig) -> None:
        self.config, self.vocabulary = config, load(Path(config.tokenizer))
        added = {
            token.content: number for number, token in self.vocabulary.tokenizer.get_added_tokens_decoder().items()
        }
        if missing := [name for name in config.controls if name not in added]:
            raise DataError(f"chat.controls: {missing[0]!r} is no special token of {config.tokenizer}")
        self._controls = added
        self._parts = {role: text.split("{content}") for role, text in config.roles.items()}
        prefix, suffix = self._parts[config.answers]
        self._opening, closing = self._template(prefix), self._template(suffix)
        if not closing:
            raise DataError(f"chat.roles.{config.answers}: nothing follows {{content}}, so no answer would ever end")
        self.stop = closing[0]  # the token that ends an answer
        if self.stop not in added.values():
            raise DataError(
                f"chat.roles.{config.answers}: {suffix!r} begins with plain text, at which an answer would end "
                f"wherever it holds that; let a special token of {config.tokenizer} follow {{content}}"
            )

    def check(self, messages: Sequence[Message]) -> None:
        """Raise BadConversation where `encode` would."""
        for message in messages:
            _role_and_content(message, self._parts)

    def encode(self, messages: Sequence[Message]) -> Turns:
        """The tokens of a conversation, with a loss on the answering role only. Raises BadConversation."""
        turns = Turns([], [])
        for message in messages:
            role, content = _role_and_content(message, self._parts)
            answers = role == self.config.answers
            prefix, suffix = (self._template(part) for part in self._parts[role])
            for tokens, learnt in ((prefix, False), (self._content(content, answers), answers), (suffix, answers)):
                turns.tokens.extend(tokens)
                turns.learnt.extend([learnt] * len(tokens))
        return turns

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The tokens that an answer is sampled after. Raises BadConversation."""
        return (*self.encode(messages).tokens, *self._opening)

    def prompt_bytes(self, messages: Sequence[Message]) -> int:
        """Of the text that `prompt` encodes, which has a token for each byte at most."""
        turns = ("".join(self._parts[message["role"]]) + message["content"] for message in messages)
        return sum(len(turn.encode()) for turn in turns) + len(self._parts[self.config.answers][0].encode())

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, with control tokens spelled out and without the token that ends it."""
        written = tokens[:-1] if tokens and tokens[-1] == self.stop else tokens
        return str(self.vocabulary.tokenizer.decode(list(written), skip_special_tokens=False))

    def _content(self, text: str, answers: bool) -> list[int]:
        return self._spelled(text, self.config.controls if answers else ())

    def _template(self, text: str) -> list[int]:
        return self._spelled(text, tuple(self._controls))

    def _spelled(self, text: str, controls: Sequence[str]) -> list[int]:
        """Encode a text; where it spells one of `controls`, that becomes the control token."""
        if not controls:
            return self._plain(text)
        pattern = "|".join(re.escape(name) for name in sorted(controls, key=len, reverse=True))
        pieces = re.split(f"({pattern})", text)
        return [
            token
            for number, piece in enumerate(pieces)
            for token in ([self._controls[piece]] if number % 2 else self._plain(piece))
        ]

    def _plain(self, text: str) -> list[int]:
        return self.vocabulary.encode([TextPart(None, text)])[0] if text else []


def _role_and_content(message: object, roles: Mapping[str, object]) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise BadConversation(f"a message is {message!r}, and not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in roles:
        raise BadConversation(f"the role {role!r} has no template; there are {', '.join(roles)}")
    if not isinstance(content, str) or not content:
        raise BadConversation(f"the content of a message of {role!r} is {content!r}, and not text")
    if not _is_unicode(content):
        raise BadConversation(f"the content of a message of {role!r} has half a surrogate pair, which is no character")
    return str(role), content


def _is_unicode(text: str) -> bool:
    """JSON may spell what no encoding of text can hold: "\\ud800"."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
