"""Fifty hostile files: what is text in them is kept, what is not is listed with file, line and reason, and no more."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec
from tests.support import hostile_corpus
from tests.support.built import contents, texts_of
from tests.support.hostile_corpus import ALL, Hostile
from tests.support.records import broken, documents, read


@pytest.mark.parametrize("file", ALL, ids=lambda file: ascii(file.name))
def test_a_hostile_file(tmp_path: Path, file: Hostile) -> None:
    (tmp_path / file.name).write_bytes(file.content)
    records = read(tmp_path / file.name)
    assert documents(records) == list(file.documents)
    found = broken(records)
    assert [entry.line for entry in found] == [line for line, _ in file.broken]
    for entry, (_, reason) in zip(found, file.broken, strict=True):
        assert entry.reason.startswith(reason)
        assert entry.reason
    for done, item in enumerate(records, 1):  # also for a build that is resumed behind any of them
        assert read(tmp_path / file.name, start=item.after) == records[done:]


def test_a_build_of_them_all_gives_a_list_that_is_read_back(tmp_path: Path) -> None:
    assert len(ALL) >= 50
    (tmp_path / "in").mkdir()
    hostile_corpus.write(tmp_path / "in")
    inputs = match_files([f"{tmp_path}/in/*"])
    assert len(inputs) == len(ALL)
    spec = BuildSpec(vocab_size=300, validation_fraction=0)
    dataset = build(inputs, spec, tmp_path / "out")
    by_name = {file.name: file for file in ALL}
    expected = [(file.name, line) for file in (by_name[entry.name] for entry in inputs) for line, _ in file.broken]
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in listed] == expected
    assert all(entry["reason"] for entry in listed)
    assert all(os.path.lexists(os.path.join(os.fsencode(tmp_path / "in"), os.fsencode(e["file"]))) for e in listed)
    assert dataset.quarantined == len(expected)
    texts = [text for entry in inputs for text in by_name[entry.name].documents]
    assert texts_of(tmp_path / "out", "train") == texts
    build(inputs, spec, tmp_path / "again", processes=2)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
