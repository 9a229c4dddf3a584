"""Records: rows written in any format, and what the readers make of files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dryvine.trainer.data.inputs import Input
from dryvine.trainer.data.readers.fields import Fields
from dryvine.trainer.data.readers.record import Broken
from dryvine.trainer.data.stream import StreamItem, StreamPosition, read_stream

ROWS = [{"meta": {"text": f"text {i}", "lang": "en" if i % 3 else "de"}, "score": i / 10} for i in range(10)]


def inputs_of(*paths: Path) -> list[Input]:
    return [Input(path, path.name, path.stat().st_size) for path in paths]


def read(*paths: Path, start: StreamPosition | None = None, field: str = "text") -> list[StreamItem]:
    return list(read_stream(inputs_of(*paths), Fields(field), start or StreamPosition()))


def documents(records: list[StreamItem]) -> list[str]:
    """Texts of the documents, put together from their pieces."""
    texts, text = [], ""
    for item in records:
        text += item.record.text
        if item.record.ends and text:
            texts.append(text)
            text = ""
    return texts


def broken(records: list[StreamItem]) -> list[Broken]:
    return [entry for item in records for entry in item.record.broken]


def write_rows(path: Path) -> Path:
    """ROWS, in the format that the suffixes name."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = pa.Table.from_pylist(ROWS)
    match "".join(path.suffixes):
        case ".jsonl":
            path.write_bytes(lines)
        case ".jsonl.gz" | ".json.gz":
            path.write_bytes(gzip.compress(lines))
        case ".jsonl.zst":
            with pa.CompressedOutputStream(str(path), "zstd") as out:
                out.write(lines)
        case ".parquet":
            pq.write_table(table, path, row_group_size=4)
        case ".arrow":
            with pa.ipc.new_file(str(path), table.schema) as out:
                out.write_table(table, max_chunksize=3)
        case ".stream.arrow":
            with pa.ipc.new_stream(str(path), table.schema) as out:
                out.write_table(table, max_chunksize=3)
    return path
