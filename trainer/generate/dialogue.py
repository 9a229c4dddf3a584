"""A conversation to the tokens that an answer is sampled after.

A fine-tuned run uses the templates it was trained with. Other models come with a chat template (Jinja, as in
transformers), which is a program from somebody else and so runs in Jinja's sandbox. The template is given a mark in
place of each message's content, and contents are encoded separately, so that text which spells a control token cannot
start a turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dryvine.trainer.data.encoding import TextPart
from dryvine.trainer.data.tokenizer import Vocabulary
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles
from dryvine.trainer.rl.chat import Chat

Messages = Sequence[Mapping[str, str]]  # role, content
_MARK = "\ue000{}\ue001"  # of the private use area, which no template writes
_MARKS = re.compile("\ue000(\\d+)\ue001")


class Dialogue(Protocol):
    """How messages become tokens, and tokens text."""

    @property
    def stop(self) -> frozenset[int]:
        """Tokens that end an answer."""

    def prompt(self, messages: Messages) -> tuple[int, ...]:
        """The tokens that an answer is sampled after."""

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer."""


class TunedDialogue:
    """Uses the templates of a fine-tuned run."""

    def __init__(self, chat: Chat) -> None:
        self._chat, self.stop = chat, frozenset({chat.stop})

    def prompt(self, messages: Messages) -> tuple[int, ...]:
        return self._chat.prompt(messages)

    def text(self, tokens: Sequence[int]) -> str:
        return self._chat.text(tokens)


class TemplateDialogue:
    """Uses a chat template. Raises HandOffError if it cannot be rendered."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._files, self.stop = files, frozenset({files.vocabulary.end})
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._refuse
        try:
            self._template = environment.from_string(files.chat_template)
        except TemplateError as error:
            raise HandOffError(f"{files.folder}: the chat template cannot be read: {error}") from None

    def prompt(self, messages: Messages) -> tuple[int, ...]:
        marked = [{**message, "content": _MARK.format(i)} for i, message in enumerate(messages)]
        end = self._files.end_text
        try:
            written = self._template.render(messages=marked, add_generation_prompt=True, eos_token=end, bos_token="")
        except (TemplateError, TypeError, AttributeError) as error:
            raise HandOffError(f"{self._files.folder}: the chat template failed: {error}") from None
        pieces = _MARKS.split(written)
        return tuple(
            token
            for i, piece in enumerate(pieces)
            for token in (plain(self._files.vocabulary, messages[int(piece)]["content"]) if i % 2 else self._own(piece))
        )

    def text(self, tokens: Sequence[int]) -> str:
        return text_of(self._files.vocabulary, tokens)

    def _own(self, text: str) -> list[int]:
        """Encode the template's own text, where a spelled control token is one."""
        tokenizer = self._files.vocabulary.tokenizer
        tokenizer.encode_special_tokens = False
        try:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        finally:
            tokenizer.encode_special_tokens = True

    def _refuse(self, why: str) -> None:
        raise TemplateError(why)


def plain(vocabulary: Vocabulary, text: str) -> list[int]:
    """Encode text in which nothing is a control token."""
    return vocabulary.encode([TextPart(None, text)])[0] if text else []


def document(vocabulary: Vocabulary, text: str) -> tuple[int, ...]:
    """As documents begin in training: behind the end of the one before."""
    return (vocabulary.end, *plain(vocabulary, text))


def text_of(vocabulary: Vocabulary, tokens: Sequence[int]) -> str:
    """Decode tokens, leaving out control tokens."""
    return str(vocabulary.tokenizer.decode(list(tokens), skip_special_tokens=True))


class Stream:
    """Decodes tokens as they arrive. A character made of several tokens is returned with its last one."""

    def __init__(self, text: Dialogue | Vocabulary) -> None:
        self._text, self._shown = text, 0

    def more(self, tokens: Sequence[int]) -> str:
        """The text that the tokens so far add to what was returned before."""
        whole = self._decode(tokens).rstrip("\ufffd")
        new, self._shown = whole[self._shown :], max(self._shown, len(whole))
        return new

    def rest(self, tokens: Sequence[int]) -> str:
        """The remaining text at the end, incomplete characters included."""
        return self._decode(tokens)[self._shown :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return text_of(self._text, tokens) if isinstance(self._text, Vocabulary) else self._text.text(tokens)
