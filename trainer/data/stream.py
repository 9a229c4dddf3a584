"""All inputs as one stream of records that can be entered at any position it has passed.

A build saves a `StreamPosition` to resume from after a kill. It is derived from the stream and never from a clock, so a
build that was killed ten times writes the same bytes as one that was not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dryvine.trainer.data.inputs import Input, reading
from dryvine.trainer.data.readers.fields import Fields
from dryvine.trainer.data.readers.record import Record
from dryvine.trainer.data.readers.table import kind_of

BATCH_BYTES = 2**22  # enough text to occupy the tokenizer's threads on every core, small enough to hold several copies
BATCH_RECORDS = 4096


class StreamPosition(NamedTuple):
    """Where reading continues: the index of the input file, and how many lines and bytes of it have been read."""

    file: int = 0
    line: int = 0
    byte: int = 0


class StreamItem(NamedTuple):
    """A record, and what is known about it beyond its file."""

    after: StreamPosition
    name: str  # of the input file
    key: bytes  # identifies the document: decides its split, and whether it is sampled or put fill-in-the-middle
    size: int  # UTF-8 bytes of the text
    record: Record


def read_stream(inputs: Sequence[Input], fields: Fields, start: StreamPosition) -> Iterator[StreamItem]:
    """Every record from `start` on. The position after a file's last record is the start of the next file, so that
    no end of a file is read twice. Raises DataError for a file that the system cannot read."""
    for index, file in enumerate(inputs[start.file :], start.file):
        kind = kind_of(file.path)
        line, byte = (start.line, start.byte) if index == start.file else (0, 0)
        with reading(file.path):
            for record, following in _with_next(kind.read(file.path, fields, line, byte)):
                after = StreamPosition(index, record.line, record.byte) if following else StreamPosition(index + 1)
                text = record.text.encode()
                key = file.name.encode(errors="surrogateescape") if kind.is_document else text
                yield StreamItem(after, file.name, key, len(text), record)


def _with_next(records: Iterator[Record]) -> Iterator[tuple[Record, Record | None]]:
    """Each record together with the one that follows it; the last with None."""
    held = next(records, None)
    while held is not None:
        following = next(records, None)
        yield held, following
        held = following


def batches(stream: Iterable[StreamItem]) -> Iterator[list[StreamItem]]:
    """The stream in lists of about BATCH_BYTES of text."""
    batch: list[StreamItem] = []
    size = 0
    for item in stream:
        batch.append(item)
        size += item.size
        if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
