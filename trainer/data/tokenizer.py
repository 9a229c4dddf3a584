"""Byte-level BPE: trained here, or a given `tokenizer.json`.

The alphabet is bytes, not characters, so no text is out of vocabulary and decode(encode(text)) is the text. The special
tokens are the few that packing needs; text that spells one out is encoded as plain characters, because a scraped page
must not be able to end its own document.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.encoding import NONCHARACTER, Encoder, TextPart

END = "<|endoftext|>"
FIM = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")  # DeepSeek-V3, arXiv 2412.19437, section 4.1
_KNOWN_ENDS = (END, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>", "<eos>")
_KNOWN_FIM = (FIM, ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"))
_PACKING_NAMES = {*_KNOWN_ENDS, *(name for names in _KNOWN_FIM for name in names)}

# Added tokens in brackets, such as <|User|> or [INST], are control tokens. Others, such as runs of blanks or words that
# extend a vocabulary, are text.
_IN_BRACKETS = re.compile(r"[<\[{|].*\w.*[>\]}|]", re.DOTALL)


class Vocabulary(NamedTuple):
    """A tokenizer and what packing needs to know about it."""

    encoder: Encoder
    size: int  # largest id + 1
    end: int  # id put after each document
    fim: tuple[int, int, int] | None  # ids before prefix, suffix and middle, in that order
    sha256: str  # of the tokenizer.json

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer

    def encode(self, parts: Sequence[TextPart]) -> list[list[int]]:
        """The token ids of each part's text. Text that spells out a special token is encoded as plain characters."""
        return list(self.encoder.encode(parts))


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary: a pure function of texts and size; ties between merges are broken by token id. Too little
    text gives a smaller vocabulary than asked for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, *FIM],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load(path: Path) -> Vocabulary:
    """Read a `tokenizer.json`.

    Raises DataError if it cannot be read, has no token that ends a document, or finds control tokens in text.
    """
    content = _read(path)
    encoder = _parse(path, content)
    tokenizer = encoder.tokenizer
    ids = tokenizer.get_vocab(with_added_tokens=True)
    end = _end(path, ids)
    if name := _spelled_control(tokenizer, end):
        raise DataError(
            f"{path}: text that spells {name} becomes that token; use a byte-level BPE, which never does so"
        )
    return Vocabulary(
        encoder,
        size=max(ids.values()) + 1,
        end=ids[end],
        fim=_fim(ids),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a tokenizer.json") from None


def _parse(path: Path, content: bytes) -> Encoder:
    try:
        return Encoder.of(Tokenizer.from_str(_for_text(content)))
    except Exception as error:  # tokenizers raises a bare Exception for whatever it cannot parse
        raise DataError(f"{path}: not a tokenizer.json ({error}); save one with tokenizer.save(path)") from None


def _is_control(name: str) -> bool:
    return name in _PACKING_NAMES or bool(_IN_BRACKETS.fullmatch(name.strip()))


def _for_text(content: bytes) -> str:
    """The tokenizer with every control token declared special, so that `encode_special_tokens` covers them all, and
    without a post-processor (see `Encoder`), which would only add special tokens that are not asked for.

    Makers list end, fill-in-the-middle and role tokens as ordinary added tokens too, and those match in any text.
    """
    described = json.loads(content)
    described["post_processor"] = None
    for token in described.get("added_tokens", ()):
        token["special"] |= _is_control(token["content"])
    return json.dumps(described)


def _spelled_control(tokenizer: Tokenizer, end: str) -> str | None:
    """A control token that the model itself finds in text that spells it; no option of `tokenizers` prevents that."""
    unknown = tokenizer.encode(NONCHARACTER, add_special_tokens=False).ids
    added = tokenizer.get_added_tokens_decoder().values()
    for name in (end, *(token.content for token in added if _is_control(token.content))):
        control = tokenizer.token_to_id(name)
        if control not in unknown and control in tokenizer.encode(name, add_special_tokens=False).ids:
            return name
    return None


def _end(path: Path, ids: Mapping[str, int]) -> str:
    for name in _KNOWN_ENDS:
        if name in ids:
            return name
    raise DataError(f"{path}: no end-of-document token; add {END} to it with tokenizer.add_special_tokens")


def _fim(ids: Mapping[str, int]) -> tuple[int, int, int] | None:
    return next(((ids[a], ids[b], ids[c]) for a, b, c in _KNOWN_FIM if {a, b, c} <= ids.keys()), None)
