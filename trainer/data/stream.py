"""All inputs as one stream of records that can be entered at any place it has passed.

A `Place` is what a build saves to go on after a kill. It is taken from the stream, never from a clock, so a build that
was killed ten times writes the same bytes as one that was not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dryvine.trainer.data.inputs import Input
from dryvine.trainer.data.readers import Record, kind_of

BATCH_BYTES = 2**22  # enough text to keep every core's tokenizer busy, little enough to hold several times over
BATCH_RECORDS = 4096


class Place(NamedTuple):
    """Where reading goes on: the number of the input file, and the lines and bytes of it that are done."""

    file: int = 0
    line: int = 0
    byte: int = 0


class Item(NamedTuple):
    after: Place
    name: str  # of the input file
    key: bytes  # of the document: what decides its split, and whether it is sampled or put fill-in-the-middle
    size: int  # bytes of text
    record: Record


def items(inputs: Sequence[Input], field: str, start: Place) -> Iterator[Item]:
    """Everything from `start` on. The last record of a file leads to the next file, so that no end is read twice."""
    for number, file in enumerate(inputs[start.file :], start.file):
        kind = kind_of(file.path)
        records = kind.read(file.path, field, *(start[1:] if number == start.file else (0, 0)))
        for record, following in itertools.pairwise(itertools.chain(records, [None])):
            assert record is not None
            after = Place(number, record.line, record.byte) if following else Place(number + 1)
            text = record.text.encode()
            yield Item(after, file.name, file.name.encode() if kind.whole else text, len(text), record)


def batches(stream: Iterable[Item]) -> Iterator[list[Item]]:
    """The stream in lists of about BATCH_BYTES of text."""
    batch: list[Item] = []
    size = 0
    for item in stream:
        batch.append(item)
        size += item.size
        if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
