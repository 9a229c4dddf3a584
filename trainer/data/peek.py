"""Sequences of a run as the model will see them, as text: `dryvine data peek`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dryvine.trainer.data.source import SequenceSource


class DocumentText(NamedTuple):
    """Tokens of one document in a sequence, decoded; special tokens are spelled out."""

    document: int  # its number in the sequence
    tokens: int
    text: str
    ends: bool  # the document ends here, not the sequence


def pieces(source: SequenceSource, number: int, seq_len: int, tokenizer: Tokenizer) -> Iterator[DocumentText]:
    """The documents of sequence `number` of a run, in order, without what is only predicted behind its end."""
    tokens, owners = source.sequences(number, 1)[0], source.documents(number, 1)[0]
    for document in np.unique(owners[:seq_len]).tolist():
        own: NDArray[np.int64] = tokens[:seq_len][owners[:seq_len] == document]
        text = tokenizer.decode(own.tolist(), skip_special_tokens=False)
        yield DocumentText(document, len(own), text, ends=document < owners[seq_len])


def tokenizer_of(source: Path, given: Path | None) -> Tokenizer:
    """The tokenizer of a dataset folder, or the one that is given: Megatron's files have none."""
    path = given or source / "tokenizer.json"
    return Tokenizer.from_file(str(path))
