"""Parquet and arrow files: every row has a document in one of its columns. Only the columns asked for are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dryvine.trainer.data.readers.fields import Fields, dig
from dryvine.trainer.data.readers.record import Record, broken_record, is_damage, reason_of, text_of

_BATCH_ROWS = 1024
_DAMAGE = (pa.ArrowException, OSError, ValueError)


class RowPlace(NamedTuple):
    """Rows read, and about how many bytes of the file they take."""

    line: int
    byte: int


class Rows(Protocol):
    """An open file of rows."""

    def batches(self, fields: Fields, skip: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches of the columns that are read, each with the number of rows before it; the first `skip` rows may be
        left out."""
        ...

    def share(self, row: int) -> float:
        """Approximate share of the file before a row."""
        ...


def read_parquet(path: Path, fields: Fields, line: int, byte: int) -> Iterator[Record]:
    """One document per row. Of a damaged file, the rows before the damage are read and the rest is left out."""
    size = path.stat().st_size
    try:
        with _open(path) as rows:
            for before, batch in rows.batches(fields, line):
                for index in range(max(line - before, 0), batch.num_rows):
                    line = before + index + 1
                    yield _record(batch, index, fields, RowPlace(line, int(size * rows.share(line))))
    except _DAMAGE as error:
        if not is_damage(error):
            raise
        yield broken_record(line + 1, size, str(error))


def column_bytes(path: Path, field: str) -> int:
    """UTF-8 bytes of the text in a column, however it is encoded and compressed; of a damaged file, before the damage.

    Reads the whole column, which takes a hundredth of the time of tokenizing it; the metadata knows encoded sizes only.
    """
    total = 0
    try:
        with _open(path) as rows:
            for _, batch in rows.batches(Fields(field), 0):
                texts = _leaf(batch, field)
                total += pc.sum(pc.binary_length(texts.cast(pa.large_string()))).as_py() or 0
    except _DAMAGE as error:
        if not is_damage(error):
            raise
    return total


class _Parquet:
    def __init__(self, source: object) -> None:
        self.file = pq.ParquetFile(source)

    def batches(self, fields: Fields, skip: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Row groups that lie before `skip` are not read."""
        _check(self.file.schema_arrow.names, fields)
        row = 0
        for group in range(self.file.num_row_groups):
            rows = self.file.metadata.row_group(group).num_rows
            if row + rows > skip:
                for batch in self.file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=fields.columns):
                    yield row, batch
                    row += batch.num_rows
            else:
                row += rows

    def share(self, row: int) -> float:
        return row / max(self.file.metadata.num_rows, 1)


class _Arrow:
    """An IPC file or stream; a stream does not say how long it is, so its progress is where it has been read to."""

    def __init__(self, source: pa.MemoryMappedFile) -> None:
        self.source = source
        try:
            file = pa.ipc.open_file(source)
            self.read = (file.get_batch(i) for i in range(file.num_record_batches))
            self.names = file.schema.names
        except pa.ArrowInvalid:
            source.seek(0)
            stream = pa.ipc.open_stream(source)
            self.read, self.names = iter(stream), stream.schema.names

    def batches(self, fields: Fields, skip: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        _check(self.names, fields)
        row = 0
        tops = list(dict.fromkeys(_top(self.names, column) for column in fields.columns))
        for batch in self.read:
            if row + batch.num_rows > skip:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield row + start, batch.select(tops).slice(start, _BATCH_ROWS)
            row += batch.num_rows

    def share(self, row: int) -> float:
        return float(self.source.tell() / self.source.size())


@contextmanager
def _open(path: Path) -> Iterator[Rows]:
    if path.suffix.lower() == ".arrow":
        with pa.memory_map(str(path)) as mapped:
            yield _Arrow(mapped)
        return
    with path.open("rb") as source:
        yield _Parquet(source)


def _top(names: list[str], path: str) -> str:
    """The column that a path starts in."""
    return path if path in names else path.partition(".")[0]


def _check(names: list[str], fields: Fields) -> None:
    for path in fields.columns:
        if _top(names, path) not in names:
            raise ValueError(f"no column {path!r}; it has {', '.join(names)}")


def _leaf(batch: pa.RecordBatch, path: str) -> pa.Array:
    if path in batch.schema.names:
        return batch.column(path)
    head, *rest = path.split(".")
    return pc.struct_field(batch.column(head), rest)


def _record(batch: pa.RecordBatch, index: int, fields: Fields, place: RowPlace) -> Record:
    try:
        # Cell by cell: one that is not UTF-8 must not take its neighbours along.
        cells = {name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        return Record(*place, text_of(dig(cells, fields.text), fields.text) if fields.wants(cells) else "")
    except ValueError as error:
        return broken_record(*place, reason_of(error))
