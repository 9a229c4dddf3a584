"""Megatron's files both ways, compressed and nested inputs, filters, lists of files, and what peek shows."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dryvine.launch.cli import app
from dryvine.trainer.config import Config
from dryvine.trainer.data import stream
from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.megatron import MegatronTokens, megatron_prefix, write_megatron
from dryvine.trainer.data.packed_tokens import PackedTokens
from dryvine.trainer.data.readers.fields import condition
from dryvine.trainer.data.spec import BuildSpec
from dryvine.trainer.data.splits import open_data
from tests.support.built import contents, texts_of
from tests.support.datasets import write_dataset
from tests.support.records import broken, documents, read, write_rows

Tiny = Callable[..., Config]


# -- Megatron


def megatron_style(prefix: Path, documents: list[list[list[int]]], code: int, dtype: str) -> None:
    """Written as the published description of the format says, by hand: documents of one or more sequences."""
    sequences = [ids for document in documents for ids in document]
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(ids, dtype).tobytes() for ids in sequences))
    lengths = [len(ids) for ids in sequences]
    size = np.dtype(dtype).itemsize
    offsets = [size * sum(lengths[:i]) for i in range(len(lengths))]
    first = [sum(len(document) for document in documents[:i]) for i in range(len(documents) + 1)]
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(first)))
        file.write(struct.pack(f"<{len(lengths)}i{len(offsets)}q{len(first)}q", *lengths, *offsets, *first))


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "u1")])
def test_a_megatron_prefix_is_read_in_place(tmp_path: Path, code: int, dtype: str) -> None:
    texts = [[[1, 2, 3]], [[4, 5], [6, 0]], [[7, 8, 9, 10, 0]], [[11, 0]]]
    megatron_style(tmp_path / "web", texts, code, dtype)
    train, val = (MegatronTokens(tmp_path / "web", split, 0.25) for split in ("train", "val"))
    assert train.tokens(0, len(train)).tolist() == [1, 2, 3, 4, 5, 6, 0, 7, 8, 9, 10, 0]
    assert val.tokens(0, len(val)).tolist() == [11, 0]
    assert train.ends_between(0, 12).tolist() == [3, 7]
    assert train.ends_between(3, 8).tolist() == [7]
    assert val.ends_between(0, 2).tolist() == []
    half = MegatronTokens(tmp_path / "web", "val", 0.5)
    assert half.tokens(0, len(half)).tolist() == [7, 8, 9, 10, 0, 11, 0]
    assert half.ends_between(0, 7).tolist() == [5]
    for start, length in ((-1, 2), (11, 2)):
        with pytest.raises(IndexError):
            train.tokens(start, length)
    assert megatron_prefix(tmp_path / "web.idx") == megatron_prefix(tmp_path / "web.bin") == tmp_path / "web"
    assert megatron_prefix(tmp_path) is None


@settings(max_examples=15, deadline=None)
@given(shards=st.lists(st.integers(1, 300), min_size=1, max_size=5), wide=st.booleans())
def test_a_dataset_goes_to_megatron_and_back(
    tmp_path_factory: pytest.TempPathFactory, shards: list[int], wide: bool
) -> None:
    folder = tmp_path_factory.mktemp("round")
    line = write_dataset(folder, shards, 70_000 if wide else 300)
    assert write_megatron(folder, "train", folder / "out") == len(shards)
    back, packed = MegatronTokens(folder / "out", "train", 0.0), PackedTokens(folder, "train")
    np.testing.assert_array_equal(back.tokens(0, len(back)), line)
    assert back.ends_between(0, len(back)).tolist() == packed.document_ends().tolist()[:-1]


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    megatron_style(tmp_path / "web", [[[1, 2, 3]], [[70, 0]]], 8, "<u2")
    line = MegatronTokens(tmp_path / "web", "train", 0.0, vocab_size=50)
    with pytest.raises(DataError, match=r"web\.bin: token ids up to 70 near token 0; set data\.vocab_size above 70"):
        line.tokens(0, 5)
    with pytest.raises(DataError, match="token ids up to 70"):
        MegatronTokens(tmp_path / "web", "train", 0.0, vocab_size=70).tokens(0, 5)
    megatron_style(tmp_path / "signed", [[[1, -2, 3]]], 4, "<i4")
    with pytest.raises(DataError, match="token ids from -2"):
        MegatronTokens(tmp_path / "signed", "train", 0.0, vocab_size=70).tokens(0, 3)
    index = (tmp_path / "web.idx").read_bytes()
    for content, complaint in (
        (index[:-30], "cut off"),
        (b"PK" + index[2:], "not a Megatron index"),
        (index[:9] + struct.pack("<Q", 2) + index[17:], "version 2"),
        (index[:17] + b"\x06" + index[18:], "tokens of type 6"),
        (index[:46] + struct.pack("<q", 8) + index[54:], "do not lie end to end"),
    ):
        (tmp_path / "web.idx").write_bytes(content)
        with pytest.raises(DataError, match=complaint):
            MegatronTokens(tmp_path / "web", "train", 0.0)
    (tmp_path / "web.idx").write_bytes(index)
    (tmp_path / "web.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"4 bytes where the \.idx says 10"):
        MegatronTokens(tmp_path / "web", "train", 0.0)


def test_a_run_reads_a_prefix_alone_and_in_a_blend(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    texts = [[draw.integers(0, 320, draw.integers(5, 60)).tolist()] for _ in range(300)]
    megatron_style(tmp_path / "web", texts, 8, "<u2")
    line = np.concatenate([np.concatenate(document) for document in texts])
    data = open_data(tiny(f'data.source="{tmp_path}/web"'))
    start = data.train.order.window(3) * 32  # type: ignore[attr-defined]
    np.testing.assert_array_equal(data.train.sequences(3, 1)[0], line[start : start + 34])
    entries = f'[{{source="{tmp_path}/web.bin", weight=1}}, {{source="{corpus}", weight=1}}]'
    blend = open_data(tiny(f"data.blend={entries}", "data.mask=document"))
    assert set(blend.held_out) == {"web.bin", corpus.name}
    assert blend.train.documents(0, 4).max() > 0


# -- what a build reads


FORMATS = [".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet", ".arrow", ".stream.arrow"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_has_the_same_documents_and_is_resumed_anywhere(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}")
    records = read(path, field="meta.text")
    assert documents(records) == [f"text {i}" for i in range(10)]
    for done, item in enumerate(records[:-1], 1):
        rest = read(path, start=item.after, field="meta.text")
        assert [r.record.text for r in rest] == [r.record.text for r in records[done:]]
    (line,) = read(path, field="meta.none")[:1]
    assert "'meta.none'" in line.record.broken[0].reason or "none" in line.record.broken[0].reason


@pytest.mark.parametrize("suffix", FORMATS)
def test_suffixes_in_capitals_are_read_alike(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}").rename(tmp_path / f"ROWS{suffix.upper()}")
    assert documents(read(path, field="meta.text")) == [f"text {i}" for i in range(10)]
    assert match_files([f"{tmp_path}/ROWS*"])[0].path == path


@pytest.mark.parametrize("suffix", FORMATS)
def test_conditions_choose_records_in_every_format(tmp_path: Path, suffix: str) -> None:
    write_rows(tmp_path / f"rows{suffix}")
    spec = BuildSpec(vocab_size=300, field="meta.text", where=("meta.lang=en", "score>=0.4"), validation_fraction=0)
    dataset = build(match_files([f"{tmp_path}/rows*"]), spec, tmp_path / "out")
    assert texts_of(tmp_path / "out", "train") == [f"text {i}" for i in (4, 5, 7, 8)]
    assert dataset.recipe["where"] == "meta.lang=en and score>=0.4"
    assert dataset.quarantined == 0


@pytest.mark.parametrize(
    ("text", "met"),
    [("a=1", True), ("a = 1.0", True), ("a!=1", False), ("a<2", True), ("a>x", False), ("a<=1", True), ("a>=1", True),
     ("a>1", False), ("a<1", False), ("b=yes", True), ("c=1", False),
     ('b="yes"', True), ("d.e=null", True), ("d.e.f=1", False), ("x.y=3", True), ("g=true", True)],
)  # fmt: skip
def test_a_condition_is_met(text: str, met: bool) -> None:
    assert condition(text).holds({"a": 1, "b": "yes", "d": {"e": None}, "x.y": 3, "g": True}) is met


def test_a_condition_without_a_sign_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="--where 'lang': write FIELD=VALUE"):
        build(match_files([f"{tmp_path}/a.jsonl"]), BuildSpec(vocab_size=300, where=("lang",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_damaged_archive_keeps_what_lies_before_the_damage(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    written = [f"{i} " + random.Random(i).randbytes(i * 7919 % 250).hex() for i in range(10_000)]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in written)
    with pa.CompressedOutputStream(str(path), {".gz": "gzip", ".zst": "zstd"}[path.suffix]) as out:
        out.write(lines)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    records = read(path)
    texts = documents(records)
    assert texts == written[: len(texts)]
    (entry,) = broken(records)
    assert entry.line == len(texts) + 1
    assert "damaged from here on" in entry.reason
    assert texts == whole_lines_before_damage(path)
    assert sum(map(len, texts)) > 2**20  # more than is decompressed at once


def whole_lines_before_damage(path: Path) -> list[str]:
    """By another route: read byte by byte."""
    content = bytearray()
    stream = pa.CompressedInputStream(pa.OSFile(str(path)), {".gz": "gzip", ".zst": "zstd"}[path.suffix])
    with suppress(OSError):
        while byte := stream.read(1):
            content += byte
    return [json.loads(line)["text"] for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def test_a_build_of_every_format_is_the_same_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BATCH_RECORDS", 3)
    for suffix in FORMATS:
        write_rows(tmp_path / f"rows{suffix}")
    inputs, spec = match_files([f"{tmp_path}/rows*"]), BuildSpec(vocab_size=300, field="meta.text", shard_tokens=20)
    build(inputs, spec, tmp_path / "whole")
    for _ in range(4):
        seen = 0

        def interrupt(stage: str, done: int, total: int) -> None:
            nonlocal seen
            seen += stage == "tokenizing"
            if seen == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(inputs, spec, tmp_path / "parts", interrupt)
    build(inputs, spec, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


# -- which files


def test_a_list_names_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt", "c d.txt"):
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "list").write_text("# chosen\nin/c d.txt\n\nin/a.txt\r\n")
    assert [file.path.name for file in match_files([f"@{tmp_path}/list"])] == ["c d.txt", "a.txt"]
    with pytest.raises(DataError, match="name a file with a path on each line"):
        match_files([f"@{tmp_path}/none"])
    (tmp_path / "list").write_text("in/gone.txt\n")
    with pytest.raises(DataError, match=r"gone\.txt.*matches no file"):
        match_files([f"@{tmp_path}/list"])


# -- the command line


def test_peek_shows_a_runs_sequence_and_export_writes_what_peek_reads(tmp_path: Path, corpus: Path) -> None:
    run = CliRunner()
    shown = run.invoke(app, ["data", "peek", str(corpus), "--sequences", "2", "--seq-len", "400", "--split", "val"])
    assert shown.exit_code == 0
    assert "sequence 0: 400 tokens" in shown.stdout
    assert "sequence 1: 400 tokens" in shown.stdout
    assert "document 0, " in shown.stdout
    done = run.invoke(app, ["data", "export", str(corpus), "--out", str(tmp_path / "mega")])
    assert done.exit_code == 0, done.output
    tokenizer = ["--tokenizer", str(corpus / "tokenizer.json")]
    again = run.invoke(app, ["data", "peek", f"{tmp_path}/mega_train", "--seq-len", "64", *tokenizer])
    assert again.exit_code == 0, again.output
    write_dataset(tmp_path / "training only", [40])
    alone = run.invoke(app, ["data", "export", f"{tmp_path}/training only", "--out", f"{tmp_path}/alone"])
    assert alone.exit_code == 0, alone.output
    assert sorted(path.name for path in tmp_path.glob("alone*")) == ["alone_train.bin", "alone_train.idx"]
    for words, complaint in (
        (["peek", str(tmp_path / "none")], "no finished dataset here"),
        (["peek", f"{tmp_path}/mega_train"], "name it with --tokenizer"),
        (["peek", str(corpus), "--split", "test"], "there are train and val"),
    ):
        refused = run.invoke(app, ["data", *words])
        assert refused.exit_code == 2
        assert complaint in " ".join(refused.output.split())
