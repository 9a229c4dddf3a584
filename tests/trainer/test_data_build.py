"""Whole builds: the same bytes however often they are killed, round trips, splits, vocabularies, fill-in-the-middle."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dryvine.trainer.data import stream, tokenizer
from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import Dataset
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.packed_tokens import PackedTokens
from dryvine.trainer.data.readers.fields import Fields
from dryvine.trainer.data.readers.table import READERS, FileKind
from dryvine.trainer.data.spec import BuildSpec
from tests.support.built import contents, corpus, texts_of


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Vocabulary:
    path = tmp_path_factory.mktemp("alphabet") / "tokenizer.json"
    tokenizer.learn_tokenizer(["the cat sat on the mat, the hat on the cat" * 3], 290).save(str(path))
    return tokenizer.load(path)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(alphabet: tokenizer.Vocabulary, text: str) -> None:
    ids = alphabet.tokenizer.encode(text, add_special_tokens=False).ids
    assert alphabet.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_text_cannot_spell_a_special_token(alphabet: tokenizer.Vocabulary) -> None:
    text = f"a{tokenizer.END}b{tokenizer.FIM[1]}"
    ids = alphabet.tokenizer.encode(text, add_special_tokens=False).ids
    assert not {alphabet.end, *(alphabet.fim or ())} & set(ids)
    assert alphabet.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_document_is_there_once_and_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH_BYTES", 800)
    (tmp_path / "in").mkdir()
    inputs = match_files(corpus(tmp_path / "in"))
    spec = BuildSpec(vocab_size=400, validation_fraction=0.3, shard_tokens=1500)
    dataset = build(inputs, spec, tmp_path / "out")
    train, val = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    items = stream.read_stream(inputs, Fields(), stream.StreamPosition())
    written = [item.record.text for item in items if item.record.text]
    assert sorted(train + val) == sorted(written)
    assert len(written) == 87
    assert 10 < len(val) < 45
    assert len(dataset.train.shards) > 3
    assert len(dataset.val.shards) > 3
    assert dataset.train.bytes == sum(len(text.encode()) for text in train)
    assert dataset.val.bytes == sum(len(text.encode()) for text in val)
    assert (dataset.train.documents, dataset.val.documents) == (len(train), len(val))
    assert dataset.quarantined == 4


def test_copies_of_a_record_are_on_one_side(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i % 20} of twenty"}) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    build(match_files([f"{tmp_path}/a.jsonl"]), BuildSpec(vocab_size=300, validation_fraction=0.4), tmp_path / "out")
    train, val = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    assert len(train) + len(val) == 100
    assert set(train)
    assert set(val)
    assert not set(train) & set(val)


def test_quarantine_names_file_line_and_reason(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    build(match_files(corpus(tmp_path / "in")), BuildSpec(vocab_size=300), tmp_path / "out")
    entries = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in entries] == [
        ("web.jsonl", 4),
        ("web.jsonl", 14),
        ("web.jsonl", 24),
        ("books.parquet", 31),
    ]
    assert entries[1]["reason"] == "no field 'text'"


KILLED = """
import os, sys
from pathlib import Path
from dryvine.trainer.data import stream
from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec
stream.BATCH_BYTES = 800
left, replace = int(sys.argv[1]), os.replace
def dying(source, target):
    global left
    left -= 1
    if left == 0:
        os._exit(9)
    replace(source, target)
os.replace = dying
spec = BuildSpec(vocab_size=300, shard_tokens=1200, validation_fraction=0.3)
build(match_files(sys.argv[3:]), spec, Path(sys.argv[2]))
"""


@pytest.mark.long
def test_a_build_killed_again_and_again_ends_up_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run dies just before it gives its n-th file its name, n going round the steps of a commit."""
    (tmp_path / "in").mkdir()
    patterns = corpus(tmp_path / "in")
    codes = []
    for n in (2, 3, 4, 8, 9, 10, 6, 7, 5, 99):
        command = [sys.executable, "-c", KILLED, str(n), str(tmp_path / "killed"), *patterns]
        codes.append(subprocess.run(command, timeout=60, check=False).returncode)
        assert (tmp_path / "killed" / "dataset.json").exists() == (codes[-1] == 0)
    assert codes == [9] * 9 + [0]
    monkeypatch.setattr(stream, "BATCH_BYTES", 800)
    spec = BuildSpec(vocab_size=300, shard_tokens=1200, validation_fraction=0.3)
    dataset = build(match_files(patterns), spec, tmp_path / "whole")
    assert len(dataset.train.shards) >= 5
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_resumed_build_does_not_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    inputs = match_files(corpus(tmp_path / "in"))
    spec = BuildSpec(vocab_size=300, shard_tokens=1200)
    monkeypatch.setattr(stream, "BATCH_BYTES", 800)
    places: list[int] = []

    def stop_halfway(what: str, done: int, total: int) -> None:
        places.append(done)
        if what == "tokenizing" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(inputs, spec, tmp_path / "out", stop_halfway)
    with pytest.raises(DataError, match="half-built from other files or settings"):
        build(inputs[1:], spec, tmp_path / "out")
    halfway, again = places[-1], list[tuple[str, int]]()
    build(inputs, spec, tmp_path / "out", lambda what, done, total: again.append((what, done)))
    assert {what for what, _ in again} == {"tokenizing"}
    assert again[0][1] > halfway / 2


def test_a_finished_folder_is_kept_and_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    inputs = match_files(corpus(tmp_path / "in"))
    spec = BuildSpec(vocab_size=300)
    first = build(inputs, spec, tmp_path / "out")
    before = contents(tmp_path / "out")

    def fail(what: str, done: int, total: int) -> None:
        raise AssertionError("it was built again")

    assert build(inputs, spec, tmp_path / "out", fail) == first
    with pytest.raises(DataError, match="holds a dataset of other files or settings"):
        build(inputs, BuildSpec(vocab_size=301), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_inputs_without_text_are_refused_and_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second try leaves nothing of the first: its quarantine is empty, also after several parts."""
    (tmp_path / "a.jsonl").write_text('{"body": "some text"}\n' * 4)
    inputs = match_files([f"{tmp_path}/a.jsonl"])
    with pytest.raises(DataError, match="no text to train on in 1 files, 4 lines skipped"):
        build(inputs, BuildSpec(vocab_size=300), tmp_path / "out")
    with pytest.raises(DataError, match="all 4 documents are held out; add text, or lower --val-fraction"):
        build(inputs, BuildSpec(vocab_size=300, field="body", validation_fraction=0.999), tmp_path / "out")
    monkeypatch.setattr(stream, "BATCH_RECORDS", 1)
    spec = BuildSpec(vocab_size=300, field="body", validation_fraction=0, shard_tokens=1)
    dataset = build(inputs, spec, tmp_path / "out")
    assert [shard.documents for shard in dataset.train.shards] == [1, 1, 1, 1]
    assert (tmp_path / "out" / "quarantine.jsonl").read_bytes() == b""


def test_the_vocabulary_is_learned_from_training_text_only(tmp_path: Path) -> None:
    for a, b in itertools.product("abcdef", repeat=2):
        (tmp_path / f"{a}{b}.txt").write_text(f"secret{a}{b} " * 50)
    build(match_files([f"{tmp_path}/*.txt"]), BuildSpec(vocab_size=600, validation_fraction=0.3), tmp_path / "out")
    vocab = tokenizer.load(tmp_path / "out" / "tokenizer.json").tokenizer.get_vocab()
    words = {token.removeprefix("Ġ") for token in vocab}
    names = {split: {text.split()[0] for text in texts_of(tmp_path / "out", split)} for split in ("train", "val")}
    assert len(names["val"]) > 4
    assert names["train"] <= words
    assert not names["val"] & words


def test_the_vocabulary_is_learned_from_a_bounded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text("some words " * 100)
    seen: list[str] = []
    train = tokenizer.learn_tokenizer

    def spy(texts: list[str], vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(tokenizer, "learn_tokenizer", spy)
    build(match_files([f"{tmp_path}/*.txt"]), BuildSpec(vocab_size=300, sample_bytes=44_000), tmp_path / "out")
    assert 20_000 < sum(len(text) for text in seen) < 70_000


def wide_tokenizer(path: Path) -> Path:
    """A byte-level tokenizer whose bytes have ids above 65535."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {f"unused{i}": i for i in range(70_000)} | {c: 70_000 + i for i, c in enumerate(alphabet)}
    wide = Tokenizer(models.BPE(vocab, []))
    wide.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wide.decoder = decoders.ByteLevel()
    wide.add_special_tokens(["</s>"])
    wide.enable_truncation(5)
    wide.save(str(path))
    return path


def test_a_given_tokenizer_with_wide_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text that is longer than five tokens")
    given = wide_tokenizer(tmp_path / "wide.json")
    spec = BuildSpec(tokenizer=given, validation_fraction=0)
    dataset = build(match_files([f"{tmp_path}/a.txt"]), spec, tmp_path / "out")
    assert (dataset.dtype, dataset.vocab_size, dataset.end_token) == ("<u4", 70_257, 70_256)
    tokens = PackedTokens(tmp_path / "out", "train").tokens(0, dataset.train.tokens)
    assert tokens.dtype == np.uint32
    assert tokens.min() >= 70_000
    assert texts_of(tmp_path / "out", "train") == ["some text that is longer than five tokens"]


def test_recipes_that_cannot_be_followed_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    given = wide_tokenizer(tmp_path / "wide.json")
    bare = Tokenizer(models.BPE())
    bare.save(str(tmp_path / "bare.json"))
    refused = {
        "--vocab-size 300: .*wide.json has 70257 ids": BuildSpec(tokenizer=given, vocab_size=300),
        "--fim-rate: .*wide.json lacks <|fim_begin|>".replace("|", r"\|"): BuildSpec(tokenizer=given, fim_rate=0.1),
        "bare.json: no end-of-document token": BuildSpec(tokenizer=tmp_path / "bare.json"),
        "a.txt: not a tokenizer.json": BuildSpec(tokenizer=tmp_path / "a.txt"),
        "none.json: No such file": BuildSpec(tokenizer=tmp_path / "none.json"),
        "--where: a.txt is text without fields": BuildSpec(vocab_size=300, where=("lang=en",)),
    }
    for reason, spec in refused.items():
        with pytest.raises(DataError, match=reason):
            build(match_files([f"{tmp_path}/a.txt"]), spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fill_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    inputs = match_files(corpus(tmp_path / "in", 60))
    plain, cut = (
        build(inputs, BuildSpec(vocab_size=300, fim_rate=rate, validation_fraction=0.2), tmp_path / f"{rate}")
        for rate in (0.0, 0.5)
    )
    before, after = texts_of(tmp_path / "0.0", "train"), texts_of(tmp_path / "0.5", "train")
    begin, hole, end = tokenizer.FIM
    rejoined = []
    for text in after:
        if text.startswith(begin):
            prefix, _, rest = text.removeprefix(begin).partition(hole)
            suffix, _, middle = rest.partition(end)
            text = prefix + middle + suffix
        rejoined.append(text)
    changed = sum(text.startswith(begin) for text in after)
    assert rejoined == before
    assert 0.35 * len(before) < changed < 0.65 * len(before)
    assert cut.train.bytes == plain.train.bytes
    assert texts_of(tmp_path / "0.0", "val") == texts_of(tmp_path / "0.5", "val")


def test_shards_are_where_dataset_json_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document may run over shards; its end is found in the shard where it ends."""
    monkeypatch.setattr("dryvine.trainer.data.readers.text.PIECE_BYTES", 100)
    monkeypatch.setattr(stream, "BATCH_BYTES", 100)
    text = "one line of a long book\n" * 100
    (tmp_path / "book.txt").write_text(text)
    spec = BuildSpec(vocab_size=300, shard_tokens=50, validation_fraction=0)
    dataset = build(match_files([f"{tmp_path}/book.txt"]), spec, tmp_path / "out")
    assert len(dataset.train.shards) > 5
    assert [shard.documents for shard in dataset.train.shards] == [0] * (len(dataset.train.shards) - 1) + [1]
    assert texts_of(tmp_path / "out", "train") == [text]
    assert Dataset.load(tmp_path / "out") == dataset


READER = """
def read_csv(path, field, line, byte):
    with path.open("rb") as file:
        file.seek(byte)
        for number, row in enumerate(iter(file.readline, b""), line + 1):
            yield Record(number, file.tell(), row.decode().split(",")[1].rstrip())
"""


def test_a_new_kind_of_file_is_one_function_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csv_reader.py").write_text("from dryvine.trainer.data.readers.record import Record\n" + READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    reader = importlib.import_module("csv_reader")
    monkeypatch.setitem(READERS, ".csv", FileKind(reader.read_csv, is_document=False))
    monkeypatch.setattr(stream, "BATCH_RECORDS", 2)
    (tmp_path / "a.csv").write_text("".join(f"{i},row {i}\n" for i in range(7)))
    spec = BuildSpec(vocab_size=300, validation_fraction=0, shard_tokens=1)
    dataset = build(match_files([f"{tmp_path}/*.csv"]), spec, tmp_path / "out")
    assert texts_of(tmp_path / "out", "train") == [f"row {i}" for i in range(7)]
    assert [shard.documents for shard in dataset.train.shards] == [2, 2, 2, 1]


def test_a_part_is_full_when_both_splits_together_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.setattr(stream, "BATCH_RECORDS", 1)
    spec = BuildSpec(vocab_size=300, shard_tokens=1000, validation_fraction=0.6)
    dataset = build(match_files(corpus(tmp_path / "in")), spec, tmp_path / "out")
    tokens = Counter[str]()
    for shard in (*dataset.train.shards, *dataset.val.shards):
        tokens[shard.name] += shard.tokens
    *full, _ = [tokens[name] for name in sorted(tokens)]
    assert len(full) > 4
    assert all(1000 <= part < 2000 for part in full)  # a document has fewer than 1000


def test_what_is_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    inputs = match_files(corpus(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("left by a build that was killed as it gave up")
    build(inputs, BuildSpec(vocab_size=300, validation_fraction=0.3), tmp_path / "out")
    shards = [f"{split}/00000.{end}" for split in ("train", "val") for end in ("bin", "ends.npy")]
    described = ["dataset.json", "inputs.json", "quarantine.jsonl", "tokenizer.json"]
    assert sorted(set(contents(tmp_path / "out")) - {".lock"}) == sorted(described + shards)
    listed = json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert listed == [{"file": str(file.path), "bytes": file.path.stat().st_size} for file in inputs]
    digest = hashlib.sha256((tmp_path / "out" / "tokenizer.json").read_bytes()).hexdigest()
    assert Dataset.load(tmp_path / "out").tokenizer_sha256 == digest


def test_progress_is_reported_in_bytes_of_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH_RECORDS", 1)
    lines = [json.dumps({"text": f"text {i}"}) + "\n" for i in range(3)]
    (tmp_path / "a.txt").write_text("0123456789")
    (tmp_path / "b.jsonl").write_text("".join(lines))
    reports: list[tuple[str, int, int]] = []
    spec = BuildSpec(vocab_size=300, validation_fraction=0)
    inputs = match_files([f"{tmp_path}/a.txt", f"{tmp_path}/b.jsonl"])
    build(inputs, spec, tmp_path / "out", lambda *report: reports.append(report))
    done = [10, *(10 + len("".join(lines[: n + 1])) for n in range(3))]
    assert reports == [(stage, n, done[-1]) for stage in ("learning the vocabulary", "tokenizing") for n in done]
