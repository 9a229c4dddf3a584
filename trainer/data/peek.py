"""Sequences of a run as the model will see them, and records as a build will, as text: `dryvine data peek`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dryvine.trainer.data import tokenizer
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.encoded import encode_batch
from dryvine.trainer.data.inputs import Input
from dryvine.trainer.data.readers.record import Broken
from dryvine.trainer.data.source import SequenceSource
from dryvine.trainer.data.spec import BuildSpec
from dryvine.trainer.data.stream import StreamPosition, read_stream


class DocumentText(NamedTuple):
    """Tokens of one document in a sequence, decoded; special tokens are spelled out."""

    document: int  # its number in the sequence
    tokens: int
    text: str
    ends: bool  # the document ends here, not the sequence


def pieces(source: SequenceSource, number: int, seq_len: int, decode: Tokenizer) -> Iterator[DocumentText]:
    """The documents of sequence `number` of a run, in order, without the tokens past its end that are only
    predicted."""
    tokens, owners = source.sequences(number, 1)[0], source.documents(number, 1)[0]
    for document in np.unique(owners[:seq_len]).tolist():
        own: NDArray[np.int64] = tokens[:seq_len][owners[:seq_len] == document]
        text = decode.decode(own.tolist(), skip_special_tokens=False)
        yield DocumentText(document, len(own), text, ends=document < owners[seq_len])


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a file or folder, which here only decodes. Raises DataError if there is none."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise DataError(f"{path}: not a tokenizer.json ({error})") from None


class RecordText(NamedTuple):
    """A record of an input file: a document, or a piece of a large one."""

    place: str  # the file, and the last line that has been read of it
    broken: tuple[Broken, ...]  # lines that were left out on the way
    text: str  # given a tokenizer: decoded again, with the special tokens that a build adds
    tokens: int | None  # None without a tokenizer
    ends: bool  # the document ends here
    held_out: bool


def records(inputs: Sequence[Input], spec: BuildSpec) -> Iterator[RecordText]:
    """The records that a build would read, in its order. Raises DataError for a tokenizer or a condition that cannot
    be used."""
    spec.check(inputs)
    vocabulary = tokenizer.load(spec.tokenizer) if spec.tokenizer else None
    for item in read_stream(inputs, spec.fields, StreamPosition()):
        text, count = item.record.text, None
        if vocabulary:
            (encoded,) = encode_batch([item], spec, vocabulary)
            text = vocabulary.tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False)
            count = encoded.ids.size
        place = f"{item.name}, line {item.record.line}"
        yield RecordText(place, item.record.broken, text, count, item.record.ends, spec.holds_out(item.key))
