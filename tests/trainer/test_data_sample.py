"""The sample that a vocabulary is learned from is about its bound, whatever the format of the inputs."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dryvine.trainer.data import vocabulary
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.readers import text as text_reader
from dryvine.trainer.data.spec import BuildJob, BuildSpec, no_progress

BOUND = 60_000


def texts(count: int, size: int = 600) -> list[str]:
    draw = random.Random(1)
    words = ["expert", "token", "gradient", "bubble", "é", "漢字"]
    return [" ".join(draw.choices(words, k=size // 6)) + f" {i}" for i in range(count)]


def sampled(folder: Path, bound: int = BOUND) -> list[str]:
    spec = BuildSpec(vocab_size=300, sample_bytes=bound, validation_fraction=0)
    return list(vocabulary._sample(BuildJob(match_files([f"{folder}/*"]), spec, folder / "out", no_progress)))


def size_of(sample: list[str]) -> int:
    return sum(len(text.encode()) for text in sample)


def test_parquet_compressed(tmp_path: Path) -> None:
    rows = [text * 20 for text in texts(400, 60)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", compression="zstd")
    assert size_of(rows) > 10 * (tmp_path / "a.parquet").stat().st_size
    assert 0.7 * BOUND < size_of(sampled(tmp_path)) < 1.3 * BOUND


def test_parquet_of_repeated_texts(tmp_path: Path) -> None:
    """Each is stored once, in a dictionary: even uncompressed the column is far smaller than its text."""
    rows = texts(40) * 100
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", compression="none")
    assert size_of(rows) > 10 * (tmp_path / "a.parquet").stat().st_size
    assert 0.5 * 600_000 < size_of(sampled(tmp_path, 600_000)) < 1.5 * 600_000


def test_parquet_whose_other_columns_are_large(tmp_path: Path) -> None:
    rows = texts(400)
    noise = [random.Random(i).randbytes(20_000) for i in range(400)]
    pq.write_table(pa.table({"text": rows, "image": noise}), tmp_path / "a.parquet")
    assert 0.7 * BOUND < size_of(sampled(tmp_path)) < 1.3 * BOUND


def test_parquet_with_nulls_of_other_types_and_damaged(tmp_path: Path) -> None:
    rows = texts(800)
    nulls = [text if i % 2 else None for i, text in enumerate(rows)]
    pq.write_table(pa.table({"text": nulls}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array(rows).cast(pa.large_string())}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.array(rows).dictionary_encode()}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": list(range(400))}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"body": rows}), tmp_path / "e.parquet")
    (tmp_path / "f.parquet").write_bytes(b"not parquet, though it is long enough")
    assert 0.7 * BOUND < size_of(sampled(tmp_path)) < 1.3 * BOUND


def test_parquet_beside_text_has_its_share(tmp_path: Path) -> None:
    rows = texts(400)
    pq.write_table(pa.table({"text": [f"parquet {text}" for text in rows]}), tmp_path / "a.parquet", compression="zstd")
    for i, text in enumerate(rows):
        (tmp_path / f"{i}.txt").write_text(text)
    drawn = sampled(tmp_path)
    assert 0.7 * BOUND < size_of(drawn) < 1.3 * BOUND
    assert 0.35 < size_of([text for text in drawn if text.startswith("parquet")]) / size_of(drawn) < 0.65


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".arrow"])
def test_other_compressed_inputs(tmp_path: Path, suffix: str) -> None:
    """What is on disk is less than a fifth of the text."""
    rows = [text * 20 for text in texts(400, 60)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".arrow":
        table, options = pa.table({"text": rows}), pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(str(path), table.schema, options=options) as out:
            out.write_table(table, max_chunksize=50)
    else:
        with pa.CompressedOutputStream(str(path), {".gz": "gzip", ".zst": "zstd"}[path.suffix]) as out:
            out.write("".join(json.dumps({"text": row}) + "\n" for row in rows).encode())
    assert size_of(rows) > 5 * path.stat().st_size
    assert 0.6 * BOUND < size_of(sampled(tmp_path)) < 1.3 * BOUND


def test_json_lines_with_other_fields(tmp_path: Path) -> None:
    """At most the bound: what lies around the text counts as text."""
    lines = [json.dumps({"text": text, "more": "x" * 600}) for text in texts(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert 0.2 * BOUND < size_of(sampled(tmp_path)) < BOUND


def test_less_text_than_the_bound_is_taken_whole(tmp_path: Path) -> None:
    rows = texts(50)
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", compression="zstd")
    assert sampled(tmp_path, size_of(rows) + 1) == rows


def test_inputs_without_any_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([None, None], pa.string())}), tmp_path / "a.parquet")
    assert not any(sampled(tmp_path))


def test_pieces_of_one_text_are_drawn_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All or nothing of a large file would be no sample of it."""
    monkeypatch.setattr(text_reader, "PIECE_BYTES", 600)
    (tmp_path / "a.txt").write_text("\n".join(texts(400)))
    assert 0.7 * BOUND < size_of(sampled(tmp_path)) < 1.3 * BOUND


@pytest.mark.parametrize("word", ["x", "-", " ", "é", "\n", "ab1+"], ids=ascii)
def test_words_of_any_length_are_learned_from_in_bounded_pieces(tmp_path: Path, word: str) -> None:
    """What is learned takes time quadratic in the longest run without, or of, blanks."""
    text = f"short words\n{word * 10_000} and more"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    pieces = sampled(tmp_path, 10**6)
    assert "".join(pieces) == text
    assert max(len(run) for piece in pieces for run in re.findall(r"\S+|\s+", piece)) <= 4096
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "short words"}))
    assert sampled(tmp_path, 10**6) == ["short words"]
