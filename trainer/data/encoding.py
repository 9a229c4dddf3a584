"""Encodes parts of a document as if they were still inside it.

Many tokenizers change the ends of their input: SentencePiece's put a "▁" in front (Prepend, Metaspace), GPT-2's may put
a space there, others strip blanks. That is meant for the ends of a document, and must not happen where a large file is
read in pieces or fill-in-the-middle cuts. So a part is encoded between two guard characters at its cuts: the change
then applies outside of them, and the guards' tokens are dropped. Most byte-level tokenizers change nothing at the ends
and need no guards.

Processes that only tokenize import this file and nothing else of ours, so that starting them costs little: no numpy,
no pydantic.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

NONCHARACTER = "\U0010ffff"  # in no vocabulary and no merge: it is encoded as bytes, or as the unknown token


class TextPart(NamedTuple):
    """A part of a document: text, and the special token in front of it, if any."""

    marker: int | None
    text: str
    starts: bool = True  # the document starts, or ends, with this text
    ends: bool = True


class ItemText(NamedTuple):
    """What an item of the stream adds to its document."""

    parts: tuple[TextPart, ...]
    end: int | None  # the token behind them, if the document ends here


class Encoder(NamedTuple):
    """A tokenizer that encodes text as nothing but text, and cut parts as if they were not. It has no post-processor:
    one that trims blanks off the places of tokens would hide to which part they belong."""

    tokenizer: Tokenizer
    in_place: bool  # it changes nothing at the ends of a text

    @staticmethod
    def of(tokenizer: Tokenizer) -> Encoder:
        """Changes the tokenizer's settings: what spells a special token is encoded as plain characters."""
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return Encoder(tokenizer, _edits_in_place(tokenizer))

    def encode(self, parts: Sequence[TextPart]) -> Iterator[list[int]]:
        """The token ids of each part's text."""
        if self.in_place or all(part.starts and part.ends for part in parts):
            texts = [part.text for part in parts]
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return (encoding.ids for encoding in encodings)
        guarded = [NONCHARACTER * (not part.starts) + part.text + NONCHARACTER * (not part.ends) for part in parts]
        encodings = self.tokenizer.encode_batch(guarded, add_special_tokens=False)
        return (_without_guards(encoding, part) for encoding, part in zip(encodings, parts, strict=True))

    def tokens_of(self, texts: Sequence[ItemText], typecode: str) -> list[array[int]]:
        """The tokens of each text with its markers and end token, as an array of this type."""
        ids = self.encode([part for text in texts for part in text.parts])
        return [_joined(text, ids, typecode) for text in texts]


def _joined(text: ItemText, ids: Iterator[list[int]], typecode: str) -> array[int]:
    out = array(typecode)
    for part in text.parts:
        out.fromlist([] if part.marker is None else [part.marker])
        out.fromlist(next(ids))
    out.fromlist([] if text.end is None else [text.end])
    return out


def _without_guards(encoding: Encoding, part: TextPart) -> list[int]:
    if not part.text:
        return []  # where both guards may be one unknown token
    # Without a guard on the left, tokens that were put in front of the text stay: they span its first character.
    first = 0 if part.starts else 1
    last = first + len(part.text)
    spans = zip(encoding.ids, encoding.offsets, strict=True)
    return [token for token, (start, end) in spans if start < last and end > first]


def _edits_in_place(tokenizer: Tokenizer) -> bool:
    """Whether cutting a text changes no more than the merges at the cut: nothing is added or stripped at the ends."""
    return _edited(tokenizer, "a\n") + _edited(tokenizer, "b") == _edited(tokenizer, "a\nb")


def _edited(tokenizer: Tokenizer, text: str) -> str:
    """The text after the tokenizer's normaliser and pre-tokenizer."""
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    if not tokenizer.pre_tokenizer:
        return text
    return "".join(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
