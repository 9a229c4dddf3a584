"""`dryvine data build` as a user sees it: a table, or one line and exit code 2."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from dryvine.launch import data_cli
from dryvine.launch.cli import app as main_app
from dryvine.launch.data_cli import app, progress_bar
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import Dataset
from dryvine.trainer.data.peek import pieces, tokenizer_of
from dryvine.trainer.data.source import TokenSource
from dryvine.trainer.data.spec import BuildSpec


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for i in range(30):
        (tmp_path / "in" / f"{i:02d}.txt").write_text(f"some words in file {i}\n" * 5)
    lines = [json.dumps({"body": f"record [bold]{i}"}) for i in range(5)] + ["{broken"] * 4
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["build", *arguments])


def test_builds_and_reports(folder: Path) -> None:
    options = ["--vocab-size", "300", "--field", "body", "--val-fraction", "0.2"]
    done = run("--text", "in/*.txt", "--text", "in/*.jsonl", "--out", "o", *options)
    assert done.exit_code == 0, done.output
    dataset = Dataset.load(folder / "o")
    assert dataset.train.documents + dataset.val.documents == 35
    assert dataset.val.documents > 0
    assert f"{dataset.train.tokens:,}" in done.output
    assert f"{dataset.train.bytes / dataset.train.tokens:.2f}" in done.output
    assert "4 broken lines skipped, listed in o/quarantine.jsonl\n  a.jsonl:6: not JSON" in done.output
    assert 'data.source="o" data.vocab_size=300' in done.output
    assert run("--text", "in/*.txt", "--text", "in/*.jsonl", "--out", "o", *options).exit_code == 0


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object, processes: int) -> Dataset:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_cli, "build_dataset", build)
    ended = run("--text", "in/*.txt", "--out", "o")
    assert ended.exit_code == 130
    assert "Interrupted. The same command continues" in ended.output


def test_an_unquoted_pattern_works(folder: Path) -> None:
    assert run("--text", "in/00.txt", "in/01.txt", "in/02.txt", "--out", "o", "--val-fraction", "0").exit_code == 0
    assert Dataset.load(folder / "o").train.documents == 3


def test_a_missing_validation_split_is_pointed_out(folder: Path) -> None:
    assert "No document was held out" in run("--text", "in/00.txt", "--out", "o", "--val-fraction", "0.001").output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--text", "none/*.txt"], "matches no file"),
        (["--text", "in/*.jsonl"], "no text to train on in 1 files, 9 lines skipped"),
        (["--text", "in/*.txt", "--tokenizer", "none.json"], "none.json: No such file"),
        (
            ["--text", "in/*.txt", "--vocab-size", "300", "--tokenizer", "o/tokenizer.json"],
            "has 265 ids; leave one",
        ),
        (["--text", "in/*.txt", "--out", "o"], "holds a dataset of other files or settings"),
    ],
)
def test_refusals_are_one_line(folder: Path, arguments: list[str], reason: str) -> None:
    assert run("--text", "in/00.txt", "--vocab-size", "265", "--val-fraction", "0", "--out", "o").exit_code == 0
    refused = run("--out", "p", *arguments)
    message = [line for line in refused.output.splitlines() if line.startswith("dryvine data build: ")]
    assert refused.exit_code == 2
    assert len(message) == 1
    assert reason in message[0]
    assert "Traceback" not in refused.output


def test_names_that_are_not_utf8_can_be_printed(folder: Path) -> None:
    """Of an input, of the folder, of a tokenizer, and in an error."""
    odd = os.fsdecode(b"caf\xe9")
    (folder / f"{odd}.txt").write_bytes(b"some words\n\xff\n")
    plain = ["--text", f"{odd}.txt", "--val-fraction", "0"]
    done = run(*plain, "--out", f"out {odd}", "--vocab-size", "260")
    assert done.exit_code == 0, done.output
    assert "  caf\\udce9.txt:2: not UTF-8" in done.output
    (folder / f"out {odd}" / "tokenizer.json").rename(folder / f"{odd}.json")
    again = run(*plain, "--out", "second", "--tokenizer", f"{odd}.json")
    assert again.exit_code == 0, again.output
    assert Dataset.load(folder / "second").recipe["tokenizer"] == "caf\\udce9.json"
    refused = run("--text", f"{odd}.csv", "--out", "third")
    assert refused.exit_code == 2
    assert "matches no file" in refused.output


def test_every_option_reaches_the_build(folder: Path) -> None:
    options = ["--vocab-size", "290", "--field", "body", "--val-fraction", "0.25", "--fim-rate", "0.5"]
    assert run("--text", "in/*.txt", "--out", "o", *options).exit_code == 0
    recipe = Dataset.load(folder / "o").recipe
    given = (recipe["vocab_size"], recipe["field"], recipe["validation_fraction"], recipe["fim_rate"])
    assert given == (290, "body", 0.25, 0.5)
    where = ["--where", "body!=x", "--where", "body>=record"]
    assert run("--text", "in/*.jsonl", "--out", "w", "--field", "body", *where).exit_code == 0
    assert Dataset.load(folder / "w").recipe["where"] == "body!=x and body>=record"
    assert run("--text", "in/*.txt", "--out", "p").exit_code == 0
    assert Dataset.load(folder / "p").recipe["vocab_size"] == 4096


def test_a_process_a_core_by_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def build(*_: object, processes: int) -> Dataset:
        asked.append(processes)
        raise DataError("far enough")

    monkeypatch.setattr(data_cli, "build_dataset", build)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5})
    for words in ([], ["--processes", "7"]):
        assert "far enough" in run("--text", "in/*.txt", "--out", "o", *words).output
    assert asked == [3, 7]


def test_peek_shows_the_sequences_that_a_run_reads(folder: Path) -> None:
    assert run("--text", "in/*.txt", "--out", "o", "--vocab-size", "300", "--val-fraction", "0").exit_code == 0
    words = ["data", "peek", "o", "--seq-len", "9", "--first", "4", "--sequences", "2", "--seed", "5"]
    shown = CliRunner().invoke(main_app, words).output
    source = TokenSource(folder / "o", "train", 9, extra=1, seed=5)
    tokenizer = tokenizer_of(Path("o/tokenizer.json"))
    found = [piece for number in (4, 5) for piece in pieces(source, number, 9, tokenizer)]
    expected = "".join(
        f"document {p.document}, {p.tokens} tokens {p.text}{'' if p.ends else '(goes on)'}" for p in found
    )
    owners = [source.documents(number, 1)[0] for number in (4, 5)]
    assert shown.count("(goes on)") == sum(row[8] == row[9] for row in owners) > 0
    heads = [word for word in shown.split("\n") if "sequence" in word]
    assert ["sequence 4: 9 tokens" in heads[0], "sequence 5: 9 tokens" in heads[1], len(heads)] == [True, True, 2]
    rest = "".join(line for line in shown.split("\n") if "sequence" not in line)
    assert "".join(rest.split()) == "".join(expected.split())
    assert "<|endoftext|>" in CliRunner().invoke(main_app, ["data", "peek", "o", "--seq-len", "200"]).output


def test_peek_shows_records_before_a_build(folder: Path) -> None:
    """Those that it would leave out with the reason, and with a tokenizer what it would write."""
    shown = peek("--text", "in/*.jsonl", "--field", "body", "--first", "3", "--sequences", "4")
    assert shown.exit_code == 0, shown.output
    words = " ".join(shown.output.split())
    assert "a.jsonl, line 4" in words
    assert "characters record [bold]3" in words
    assert "left out: line 6: not JSON" in words
    assert "line 8" not in words
    unwanted = peek("--text", "in/*.jsonl", "--field", "body", "--where", "body!=record [bold]0")
    assert "not wanted by --where" in unwanted.output
    assert run("--text", "in/*.txt", "--out", "o", "--vocab-size", "300", "--val-fraction", "0").exit_code == 0
    given = peek("--text", "in/07.txt", "--tokenizer", "o/tokenizer.json")
    dataset = Dataset.load(folder / "o")
    assert f", {dataset.train.tokens // 30:,} tokens" in given.output
    assert "file 7\n<|endoftext|>" in given.output
    held_out = BuildSpec(vocab_size=300).holds_out
    every = peek("--text", "in/*.txt", "--sequences", "30").output
    assert every.count("validation, ") == sum(held_out(f"{i:02d}.txt".encode()) for i in range(30)) > 0
    for words, complaint in (
        (["--text", "in/07.txt", "--first", "1"], "--first 1: the files have fewer records"),
        (["o", "--text", "in/07.txt"], "name a dataset folder, or files with --text; not both"),
        ([], "name a dataset folder, or files with --text; not both"),
        (["--text", "none/*"], "matches no file"),
        (["--text", "in/07.txt", "--where", "lang"], "write FIELD=VALUE"),
        (["--text", "in/07.txt", "--tokenizer", "in/07.txt"], "not a tokenizer.json"),
    ):
        refused = peek(*words)
        assert refused.exit_code == 2
        assert complaint in " ".join(refused.output.split())


def peek(*words: str) -> Result:
    return CliRunner().invoke(main_app, ["data", "peek", *words])


def test_the_table_has_a_row_for_each_split(folder: Path) -> None:
    done = run("--text", "in/*.txt", "--out", "o", "--vocab-size", "300", "--val-fraction", "0.2")
    dataset = Dataset.load(folder / "o")
    rows = {words[1]: words for line in done.output.splitlines() if len(words := line.split()) > 8}
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        figures = f"{split.documents:,}", f"{split.tokens:,}", f"{split.bytes:,}", f"{split.bytes / split.tokens:.2f}"
        assert tuple(rows[name][3::2]) == figures


def test_the_bar_counts_towards_the_whole() -> None:
    output = io.StringIO()
    with progress_bar(Console(file=output, force_terminal=True, width=100)) as on_progress:
        on_progress("reading", 500, 2000)
    assert "0.5/2.0 kB" in output.getvalue()
