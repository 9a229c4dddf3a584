"""Patterns over untidy folders: every file once, whatever links to it and whatever it is called."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.inputs import Input, match_files
from dryvine.trainer.data.packed_tokens import PackedTokens
from dryvine.trainer.data.spec import BuildSpec


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name}\n")


def names(*patterns: str) -> list[str]:
    return [file.name for file in match_files(patterns)]


def test_patterns(tmp_path: Path) -> None:
    write(tmp_path, "b/2.txt", "b/1.txt", "a/9.txt", "c.jsonl")
    patterns = f"{tmp_path}/b/*.txt", f"{tmp_path}/**/*.txt", f"{tmp_path}/c.jsonl"
    assert names(*patterns) == ["b/1.txt", "b/2.txt", "a/9.txt", "c.jsonl"]
    with pytest.raises(DataError, match=r"no\*\.txt': matches no file"):
        match_files([f"{tmp_path}/b/*.txt", f"{tmp_path}/no*.txt"])
    with pytest.raises(DataError, match=r"/b': matches no file; name its files, as in '.*/b/\*\*/\*\.jsonl'"):
        match_files([f"{tmp_path}/b"])
    write(tmp_path, "d.csv")
    with pytest.raises(DataError, match=r"d\.csv: no reader for \.csv; known: \.txt"):
        match_files([f"{tmp_path}/*.csv"])


def test_patterns_mean_what_glob_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "b/c.txt", "b/d/e.txt", "b/.hidden/f.txt", "b/.g.txt", "b/d/h.md")
    monkeypatch.chdir(tmp_path / "b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("**/*.txt") == ["c.txt", "d/e.txt"]
    assert names("../**/*.txt") == ["a.txt", "b/c.txt", "b/d/e.txt"]
    assert names("**") == ["c.txt", "d/e.txt", "d/h.md"]
    assert names("../b/**/[!h].??*") == ["c.txt", "d/e.txt"]
    assert names("~/b/*/*.md", "~/?.txt") == ["b/d/h.md", "a.txt"]
    assert names("./c.txt", ".g.txt") == ["c.txt", ".g.txt"]
    (tmp_path / "list").write_text("b/c.txt\na.txt\n")
    assert names("@~/list") == ["b/c.txt", "a.txt"]
    monkeypatch.chdir(tmp_path)
    assert names("**/*.txt") == ["a.txt", "b/c.txt", "b/d/e.txt"]
    assert names("../**/b/**/e.txt") == ["e.txt"]


def test_a_folder_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, *(f"sub/{i}.txt" for i in range(40)))
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "sub" / "aloft").symlink_to("..")
    (tmp_path / "itself").symlink_to("itself")
    expected = [f"{i}.txt" for i in sorted(map(str, range(40)))]
    assert names(f"{tmp_path}/**/*.txt") == expected
    spec = BuildSpec(vocab_size=300, validation_fraction=0.5)
    dataset = build(match_files([f"{tmp_path}/**/*.txt"]), spec, tmp_path / "out")
    assert dataset.train.documents + dataset.val.documents == 40


def test_many_loops_do_not_multiply(tmp_path: Path) -> None:
    """Followed like trees, ten loops in a folder have 10 ** 40 paths."""
    write(tmp_path, "a.txt", "b/c.txt")
    for i in range(10):
        (tmp_path / "b" / f"loop{i}").symlink_to(tmp_path)
    assert names(f"{tmp_path}/**/*.txt") == ["a.txt", "b/c.txt"]


def test_a_file_reached_by_several_names_is_read_once(tmp_path: Path) -> None:
    """By a link to it, a link to its folder, a hard link, and another pattern; the first pattern's name stays."""
    write(tmp_path, "b/1.txt", "b/2.txt")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b" / "0.txt").symlink_to("1.txt")
    os.link(tmp_path / "b" / "2.txt", tmp_path / "b" / "3.txt")
    assert names(f"{tmp_path}/b/*.txt") == ["1.txt", "2.txt"]
    assert names(f"{tmp_path}/**/*.txt") == ["1.txt", "2.txt"]
    assert names(f"{tmp_path}/a/*.txt") == ["1.txt", "2.txt"]
    assert names(f"{tmp_path}/b/3.txt", f"{tmp_path}/b/*.txt") == ["3.txt", "1.txt"]
    assert [file.path for file in match_files([f"{tmp_path}/**/2.txt"])] == [tmp_path / "b" / "2.txt"]


def test_links_to_data_elsewhere_are_followed(tmp_path: Path) -> None:
    """As in the cache of the hub, where names are links to blobs without a suffix."""
    write(tmp_path, "blobs/0a1b", "far/deep/x.txt")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "part.txt").symlink_to("../blobs/0a1b")
    (tmp_path / "in" / "web").symlink_to("../far")
    (tmp_path / "in" / "dangling.txt").symlink_to("nowhere")
    assert names(f"{tmp_path}/in/**/*.txt") == ["part.txt", "web/deep/x.txt"]


def test_names_with_brackets_are_names_first(tmp_path: Path) -> None:
    write(tmp_path, "part[1].txt", "part1.txt", "data [v2]/a.txt", "data [v2]/b.txt", "data v/c.txt", "[x]/[y].txt")
    assert names(f"{tmp_path}/part[1].txt") == ["part[1].txt"]
    assert names(f"{tmp_path}/part[0-9].txt") == ["part1.txt"]
    assert names(f"{tmp_path}/data [v2]/*.txt") == ["a.txt", "b.txt"]
    assert names(f"{tmp_path}/**/[y].txt") == ["[y].txt"]
    assert names(f"{tmp_path}/part*.txt") == ["part1.txt", "part[1].txt"]


def test_a_list_names_files_with_brackets_and_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9[1].txt")
    write(tmp_path, "in/part[1].txt", "in/part1.txt")
    (tmp_path / "in" / odd).write_text("x")
    (tmp_path / "list").write_bytes(b"in/part[1].txt\nin/caf\xe9[1].txt\nin/part[0-9].txt\n")
    assert names(f"@{tmp_path}/list") == ["part[1].txt", odd, "part1.txt"]


def test_a_file_called_like_a_pattern_does_not_hide_what_the_pattern_matches(tmp_path: Path) -> None:
    write(tmp_path, "*.txt", "a.txt", "?.txt", "**/b.txt")
    assert names(f"{tmp_path}/*.txt") == ["*.txt", "?.txt", "a.txt"]
    assert names(f"{tmp_path}/**/*.txt") == ["**/b.txt", "*.txt", "?.txt", "a.txt"]


def documents_of(folder: Path) -> int:
    return sum(len(PackedTokens(folder, split).document_ends()) for split in ("train", "val"))


ODD = [b"caf\xe9.txt", b"\xff\xfe/a.txt", b"new\nline.txt", b'quote".txt', "☃.txt".encode(), b"bad\x80.jsonl"]


def odd_files(folder: Path) -> list[Input]:
    for name in ODD:
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b'{"text": "x"}\n{broken\n\xff\n')
    return match_files([f"{folder}/**/*.txt", f"{folder}/*.jsonl"])


def test_names_that_are_not_utf8_are_built_and_round_trip(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    inputs = odd_files(tmp_path / "in")
    assert {os.fsencode(file.name) for file in inputs} == set(ODD)
    build(inputs, BuildSpec(vocab_size=300, validation_fraction=0.2), tmp_path / "out")
    assert documents_of(tmp_path / "out") == len(ODD)
    quarantine = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {os.fsencode(entry["file"]) for entry in quarantine} == set(ODD)
    assert '"☃.txt"' in (tmp_path / "out" / "quarantine.jsonl").read_text()
    listed = json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert [os.fsencode(entry["file"]) for entry in listed] == [bytes(file.path) for file in inputs]


def test_a_build_of_odd_names_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    inputs = odd_files(tmp_path / "in")
    spec = BuildSpec(vocab_size=300, shard_tokens=1, validation_fraction=0)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "tokenizing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(inputs, spec, tmp_path / "out", stop)
    assert build(inputs, spec, tmp_path / "out").train.documents == len(ODD)


def test_what_a_build_wrote_is_never_its_input(tmp_path: Path) -> None:
    """An interrupted build inside its own pattern is resumed, and a second dataset does not read the first one's."""
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n{broken\n')
    inputs = match_files([f"{tmp_path}/**/*"])
    out = tmp_path / "set" / "one"
    for kill_at in ("learning the vocabulary", "tokenizing"):

        def stop_there(stage: str, done: int, total: int, kill_at: str = kill_at) -> None:
            if stage == kill_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(inputs, BuildSpec(vocab_size=300, validation_fraction=0), out, stop_there)
        assert match_files([f"{tmp_path}/**/*"]) == inputs
    build(inputs, BuildSpec(vocab_size=300, validation_fraction=0), out)
    assert match_files([f"{tmp_path}/**/*"]) == inputs
    (tmp_path / "link").symlink_to(out)
    assert match_files([f"{tmp_path}/**/*.jsonl", f"{tmp_path}/**/*"]) == inputs


def test_a_failed_build_leaves_nothing_that_the_next_one_reads(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "some text"}\n{"body": "more"}\n')
    inputs = match_files([f"{tmp_path}/**/*.jsonl"])
    with pytest.raises(DataError, match="no text to train on"):
        build(inputs, BuildSpec(vocab_size=300), tmp_path / "out")
    assert (tmp_path / "out" / "quarantine.jsonl").stat().st_size > 0
    assert match_files([f"{tmp_path}/**/*.jsonl"]) == inputs


def test_texts_beside_a_dataset_are_inputs(tmp_path: Path) -> None:
    """Built into the folder of its texts; and files of the same names elsewhere are the user's own."""
    write(tmp_path, "a.txt", "train/b.txt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "quarantine.jsonl").write_text('{"text": "about ships"}\n')
    patterns = [f"{tmp_path}/**/*.txt", f"{tmp_path}/**/*.jsonl"]
    inputs = match_files(patterns)
    build(inputs, BuildSpec(vocab_size=300, validation_fraction=0), tmp_path)
    assert [file.name for file in inputs] == ["a.txt", "train/b.txt", "other/quarantine.jsonl"]
    assert match_files(patterns) == inputs


def test_a_pattern_that_only_matches_a_dataset_says_so(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    build(match_files([f"{tmp_path}/a.txt"]), BuildSpec(vocab_size=300, validation_fraction=0), tmp_path / "out")
    with pytest.raises(DataError, match="matches no file"):
        match_files([f"{tmp_path}/out/*"])
