"""Records out of files: nothing lost, nothing doubled, broken lines named, and every place can be resumed from."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dryvine.trainer.data.readers import jsonl, record
from dryvine.trainer.data.readers import text as text_reader
from dryvine.trainer.data.readers.record import Broken
from dryvine.trainer.data.stdlib import stdlib_files
from tests.support.records import broken, documents, read


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.sampled_from("ab\n\r é€😀"), min_size=1, max_size=200), piece=st.integers(4, 40))
def test_text_in_pieces_is_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, piece: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(text_reader, "PIECE_BYTES", piece)
    records = read(path)
    assert documents(records) == [text]
    assert sum(item.record.ends for item in records) == 1
    assert records[0].record.starts
    assert not any(item.record.starts for item in records[1:])
    assert max(item.size for item in records) < 6 * piece  # bounded, however long the lines


def test_large_text_is_cut_where_a_line_begins_with_a_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("def f():\n    return 1\n\n\n" * 50)
    monkeypatch.setattr(text_reader, "PIECE_BYTES", 100)
    pieces = [item.record.text for item in read(path)]
    assert len(pieces) > 5
    assert all(text.startswith("def") for text in pieces)


def test_broken_lines_of_text_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo \xff\nthree\n" + b"four\n" * 30 + b"\xe2\x82")
    for piece in (2**20, 16):
        monkeypatch.setattr(text_reader, "PIECE_BYTES", piece)
        records = read(path)
        assert documents(records) == ["one\nthree\n" + "four\n" * 30]
        assert broken(records) == [Broken(2, "not UTF-8"), Broken(34, "not UTF-8")]


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one\ntwo", encoding="utf-8-sig")
    lines.write_text('{"text": "three"}\n', encoding="utf-8-sig")
    assert documents(read(text, lines)) == ["one\ntwo", "three"]


JSON_LINES = [
    (b'{"text": "one"}', None),
    (b'{"text": "two"', "not JSON: Expecting ',' delimiter, column 15"),
    (b"", None),
    (b'{"words": "x"}', "no field 'text'"),
    (b'{"text": null}', "'text' is null"),
    (b'{"text": 3}', "'text' is int, not a string"),
    (b'{"text": ""}', "'text' is empty"),
    (b'["text"]', "a JSON list, not an object"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "half of a surrogate pair, which is no text"),
    (b"[" * 200_000, "recursion"),
    (b'{"text": "two\\nlines", "more": 1}', None),
]


def test_broken_json_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in JSON_LINES))
    records = read(path)
    assert documents(records) == ["one", "two\nlines"]
    expected = [(number, reason) for number, (_, reason) in enumerate(JSON_LINES, 1) if reason]
    listed = broken(records)
    assert [entry.line for entry in listed] == [line for line, _ in expected]
    for entry, (_, reason) in zip(listed, expected, strict=True):
        assert reason in entry.reason


def test_a_json_line_too_long_to_hold_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "{"x" * 5000}"}}\n{{"text": "after"}}\n')
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(record, "_STEP_BYTES", 100)
    records = read(path)
    assert documents(records) == ["after"]
    ((line, reason),) = broken(records)
    assert line == 1
    assert reason.startswith("longer than")


def write_parquet(path: Path, texts: list[str | None], **options: object) -> Path:
    pq.write_table(pa.table({"n": list(range(len(texts))), "text": pa.array(texts, pa.string())}), path, **options)
    return path


def test_parquet_rows(tmp_path: Path) -> None:
    texts = [f"row {i}" if i % 7 else None for i in range(50)]
    records = read(write_parquet(tmp_path / "a.parquet", texts, row_group_size=8))
    assert documents(records) == [text for text in texts if text]
    assert [entry.line for entry in broken(records)] == list(range(1, 51, 7))


def test_parquet_that_cannot_be_read_does_not_end_the_job(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "z.parquet", ["good"])
    (tmp_path / "noise.parquet").write_bytes(b"not parquet at all, but long enough")
    (tmp_path / "half.parquet").write_bytes(good.read_bytes()[:-30])
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"text": pa.array([b"\xff", b"x"]).view(pa.string())}), tmp_path / "utf8.parquet")
    names = ("noise", "half", "column", "utf8", "z")
    records = read(*(tmp_path / f"{name}.parquet" for name in names))
    assert documents(records) == ["x", "good"]
    assert [item.name for item in records if item.record.broken] == [f"{name}.parquet" for name in names[:4]]
    assert "no column 'text'; it has body" in broken(records)[2].reason
    assert broken(records)[3] == Broken(1, "not UTF-8")


def test_damage_inside_parquet_gives_the_rows_before_it(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [f"row {i} " * 50 for i in range(64)], row_group_size=16)
    content = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(2).column(1).dictionary_page_offset
    content[offset : offset + 200] = bytes(200)
    path.write_bytes(content)
    records = read(path, write_parquet(tmp_path / "b.parquet", ["next"]))
    assert len(documents(records)) == 33
    assert [entry.line for entry in broken(records)] == [33]


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    (tmp_path / "a.txt").write_bytes(b"\xff\n" + "line é\nanother\n".encode() * 20)
    (tmp_path / "empty.txt").write_bytes(b"")
    rows = [json.dumps({"text": f"doc {i}"}) if i % 4 else "{" for i in range(12)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows) + "\n")
    write_parquet(tmp_path / "c.parquet", ["p", None, "q", "r"], row_group_size=2)
    return [tmp_path / name for name in ("a.txt", "empty.txt", "b.jsonl", "c.parquet", "a.txt")]


def test_reading_goes_on_from_any_place(mixed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_reader, "PIECE_BYTES", 50)
    records = read(*mixed)
    assert len(records) > 25
    for done, item in enumerate(records, 1):
        assert read(*mixed, start=item.after) == records[done:]


def test_records_are_known_by_text_and_files_by_name(mixed: list[Path]) -> None:
    keys = {item.name: item.key for item in read(*mixed) if item.record.text}
    assert keys["a.txt"] == b"a.txt"
    assert keys["b.jsonl"] == b"doc 11"


def test_the_embedded_corpus_is_the_same_for_every_build_of_python() -> None:
    files = stdlib_files()
    names = [file.name for file in files]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py", "typing.py"} <= set(names)
    left_out = {"test", "tests", "encodings", "tkinter", "site-packages"}
    assert not [name for name in names if left_out & set(name.split("/")) or name.startswith("_sysconfigdata")]
    assert sum(file.size for file in files) > 8e6


def test_progress_in_parquet_goes_with_the_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [f"row {i}" for i in range(50)], row_group_size=8)
    size = path.stat().st_size
    records = [item.record for item in read(path)]
    assert [record.byte for record in records] == [size * row // 50 for row in range(1, 51)]


def test_the_embedded_corpus_leaves_out_what_one_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["abc.py", "json/decoder.py", "pydoc_data/topics.py"]
    left_out = [
        "test/test_abc.py", "idlelib/run.py", "encodings/cp037.py", "site-packages/torch.py", "json/__pycache__/x.py",
        "config-3.11-x86_64-linux-gnu/python-config.py", "_sysconfigdata__linux.py", "sitecustomize.py", "abc.txt",
    ]  # fmt: skip
    for name in (*kept, *left_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert [file.name for file in stdlib_files()] == kept
