"""Text files that are not what their name says: other encodings, binaries, and bad bytes in very long lines."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.readers import text as text_reader
from dryvine.trainer.data.readers.fields import Fields
from dryvine.trainer.data.readers.record import Broken, Record
from dryvine.trainer.data.readers.table import kind_of
from dryvine.trainer.data.spec import BuildSpec

MIB = 2**20
POEM = "One line of a poem,\nand another, with é and 漢字.\n" * 30


def read(path: Path) -> tuple[str, list[Broken]]:
    records = list(kind_of(path).read(path, Fields(), 0, 0))
    return "".join(record.text for record in records), [entry for record in records for entry in record.broken]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (POEM.encode("utf-16"), "UTF-16, not UTF-8; convert it with iconv -f UTF-16 -t UTF-8"),
        (b"\xfe\xff" + POEM.encode("utf-16-be"), "UTF-16, not UTF-8; convert it with iconv -f UTF-16 -t UTF-8"),
        (POEM.encode("utf-32"), "UTF-32, not UTF-8; convert it with iconv -f UTF-32 -t UTF-8"),
        (b"\0\0\xfe\xff" + POEM.encode("utf-32-be"), "UTF-32, not UTF-8; convert it with iconv -f UTF-32 -t UTF-8"),
        (POEM.encode("utf-16-le"), "NUL bytes: UTF-16 without its mark, or not text"),
        (POEM.encode("utf-16-be"), "NUL bytes: UTF-16 without its mark, or not text"),
        ("漢字\n".encode("utf-16-le") * 50, "NUL bytes: UTF-16 without its mark, or not text"),
        (gzip.compress(POEM.encode(), mtime=0), "NUL bytes: UTF-16 without its mark, or not text"),
    ],
    ids=["16", "16be", "32", "32be", "16le-unmarked", "16be-unmarked", "16le-chinese", "gzip"],
)
def test_a_file_of_another_encoding_is_left_out_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text(POEM)
    assert read(tmp_path / "a.txt") == ("", [Broken(1, reason)])
    dataset = build(
        match_files([f"{tmp_path}/*.txt"]), BuildSpec(vocab_size=300, validation_fraction=0), tmp_path / "o"
    )
    assert (dataset.train.documents, dataset.train.bytes, dataset.quarantined) == (1, len(POEM.encode()), 1)


def test_other_encodings_further_on_in_a_file_are_left_out_line_by_line(tmp_path: Path) -> None:
    """As `cat` makes of files in several encodings."""
    start = POEM * 10
    (tmp_path / "a.txt").write_bytes(start.encode() + "x\ny\n".encode("utf-16") + b"\nthe end")
    text, broken = read(tmp_path / "a.txt")
    lines = start.count("\n")
    assert text == start + "the end"
    assert broken == [Broken(lines + i, "NUL bytes, which no text has") for i in (1, 2, 3)]


def test_json_lines_of_another_encoding_are_left_out_as_a_file(tmp_path: Path) -> None:
    lines = '{"text": "one"}\n{"text": "two"}\n'
    for name, encoding in (("a", "utf-16"), ("b", "utf-32"), ("c", "utf-16-le"), ("d", "utf-16-be")):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(lines.encode(encoding))
        text, broken = read(path)
        assert (text, len(broken), broken[0].line) == ("", 1, 1)
        assert "UTF-16" in broken[0].reason or "UTF-32" in broken[0].reason


def test_records_of_letters_with_nuls_between_are_left_out(tmp_path: Path) -> None:
    wrong = "".join(letter + "\0" for letter in "some text")
    reason = "NUL characters: UTF-16 read as bytes"
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in (wrong, "fine", "a stray \0 NUL"))
    )
    assert read(tmp_path / "a.jsonl") == ("finea stray \0 NUL", [Broken(1, reason)])
    pq.write_table(pa.table({"text": [wrong, "fine"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ("fine", [Broken(1, reason)])


@pytest.mark.parametrize("bad", [b"\xff", b"\0", b"\xe2\x82"], ids=["byte", "nul", "half a character"])
@pytest.mark.parametrize("place", [0, MIB - 1, MIB, 2 * MIB + 5, 4 * MIB - 2], ids=lambda place: f"{place}")
def test_a_bad_byte_in_a_long_line_leaves_out_the_line(tmp_path: Path, bad: bytes, place: int) -> None:
    line = bytearray(b"x" * 4 * MIB)
    line[place : place + len(bad)] = bad
    before = "the first line\n" + "much text\n" * 900  # NULs in the first 8000 bytes would leave out the file
    (tmp_path / "a.txt").write_bytes(before.encode() + line + b"\nafter\n")
    reason = "NUL bytes, which no text has" if bad == b"\0" else "not UTF-8"
    assert read(tmp_path / "a.txt") == (before + "after\n", [Broken(902, reason)])


def test_a_long_line_that_ends_the_file_in_half_a_character(tmp_path: Path) -> None:
    for size in (MIB, 2 * MIB, 2 * MIB + 1, 3 * MIB + 2):
        (tmp_path / "a.txt").write_bytes(b"first\n" + b"x" * (size - 2) + b"\xe6\xbc")
        assert read(tmp_path / "a.txt") == ("first\n", [Broken(2, "not UTF-8")])


def test_lines_of_all_lengths_with_bad_ones_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition: split into lines, keep what decodes. And from every position the rest is the same."""
    monkeypatch.setattr(text_reader, "PIECE_BYTES", 16)
    draw, path = random.Random(3), tmp_path / "a.txt"
    for _ in range(150):
        alphabet = [b"a", b"bc", "é".encode(), "漢".encode(), "😀".encode()]
        lines = [b"".join(draw.choices(alphabet, k=draw.choice([0, 1, 5, 14, 40, 90]))) for _ in range(12)]
        for i in draw.sample(range(12), 3):
            cut = draw.randint(0, len(lines[i]))
            lines[i] = lines[i][:cut] + b"\xff" + lines[i][cut:]
        path.write_bytes(b"\n".join(lines))
        expected, wrong = "", []
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            try:
                expected += line.decode()
            except UnicodeDecodeError:
                wrong.append(number)
        text, broken = read(path)
        assert text == expected
        assert [entry.line for entry in broken] == wrong
        records = list(text_reader.read_text(path, Fields(), 0, 0))
        for done, record in enumerate(records[:-1], 1):
            assert list(text_reader.read_text(path, Fields(), record.line, record.byte)) == records[done:]
        assert max(len(record.text.encode()) for record in records) < 6 * 16


def test_a_very_long_line_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is entered in the middle, by a resumed build: checking at every piece would be quadratic."""
    monkeypatch.setattr(text_reader, "PIECE_BYTES", 16)
    path, checked = tmp_path / "a.txt", list[int]()
    path.write_text("é" * 1000 + "\nsecond " + "x" * 500)
    check = text_reader._check_long_line
    monkeypatch.setattr(text_reader, "_check_long_line", lambda *given: checked.append(1) or check(*given))
    records: list[Record] = list(text_reader.read_text(path, Fields(), 0, 0))
    assert len(records) > 30
    assert len(checked) == 2
    assert list(text_reader.read_text(path, Fields(), records[5].line, records[5].byte)) == records[6:]
    assert len(checked) == 3


def test_only_a_mark_at_the_start_of_a_file_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for piece in (MIB, 8):
        monkeypatch.setattr(text_reader, "PIECE_BYTES", piece)
        (tmp_path / "a.txt").write_text("\ufeffone\n\ufefftwo\n\ufeff", encoding="utf-8")
        assert read(tmp_path / "a.txt") == ("one\n\ufefftwo\n\ufeff", [])


def test_a_line_of_several_pieces_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 3 * MIB + b"\n\xff\nlast")
    assert read(tmp_path / "a.txt")[1] == [Broken(2, "not UTF-8")]
