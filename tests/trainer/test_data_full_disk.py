"""A disk that is full: whatever cannot be written is named, nothing looks finished, and the same command goes on."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dryvine.trainer.data.atomic import CannotWrite
from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import Input, match_files
from dryvine.trainer.data.megatron import megatron_prefix, write_megatron
from dryvine.trainer.data.quality.clean import CleanSpec, write_clean
from dryvine.trainer.data.spec import BuildSpec
from tests.support.built import contents, corpus

SPEC = BuildSpec(vocab_size=300, shard_tokens=6000, validation_fraction=0.3)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more bytes to a file fails, as on a full disk, with "File too large"."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Input]:
    (tmp_path / "in").mkdir()
    _, jsonl, parquet = corpus(tmp_path / "in")
    return match_files([jsonl, parquet])


def fails_at(file: str, inputs: list[Input], whole: Path, out: Path) -> None:
    """Build on a disk on which a file of the dataset `whole` does not fit."""
    too_little, said = (whole / file).stat().st_size - 1, f"{re.escape(str(out / file))}: File too large; fix that"
    with files_of_at_most(too_little), pytest.raises(CannotWrite, match=said):
        build(inputs, SPEC, out)
    assert not (out / "dataset.json").exists()
    build(inputs, SPEC, out)
    assert contents(out) == contents(whole)


def test_a_build_names_what_it_cannot_write_and_goes_on(tmp_path: Path, inputs: list[Input]) -> None:
    build(inputs, SPEC, tmp_path / "whole")
    for number, file in enumerate(("inputs.json", "tokenizer.json", "train/00000.bin")):
        fails_at(file, inputs, tmp_path / "whole", tmp_path / f"{number}")


def test_lines_left_out_are_not_lost(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(9)) + "{\n" * 400)
    inputs = match_files([f"{tmp_path}/a.jsonl"])
    build(inputs, SPEC, tmp_path / "whole")
    fails_at("quarantine.jsonl", inputs, tmp_path / "whole", tmp_path / "out")


def test_the_ends_of_documents_are_not_lost(tmp_path: Path) -> None:
    """Of documents so short that their ends take more bytes than their tokens."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{chr(97 + i % 26)}"}}\n' for i in range(1500)))
    inputs = match_files([f"{tmp_path}/a.jsonl"])
    build(inputs, SPEC, tmp_path / "whole")
    fails_at("train/00000.ends.npy", inputs, tmp_path / "whole", tmp_path / "out")
    write_megatron(tmp_path / "whole", "train", tmp_path / "exported")
    too_little = (tmp_path / "exported.idx").stat().st_size - 1
    with files_of_at_most(too_little), pytest.raises(CannotWrite, match=r"again\.idx: File too large"):
        write_megatron(tmp_path / "whole", "train", tmp_path / "again")
    assert not megatron_prefix(tmp_path / "again")


def test_an_export_and_a_clean_copy_name_what_they_cannot_write(tmp_path: Path, inputs: list[Input]) -> None:
    build(inputs, SPEC, tmp_path / "whole")
    for size in (10, 500, 2000, 5000):
        prefix, out = tmp_path / f"export {size}", tmp_path / f"clean {size}"
        with pytest.raises(CannotWrite, match=rf"export {size}\.(bin|idx): File too large"), files_of_at_most(size):
            write_megatron(tmp_path / "whole", "train", prefix)
        assert not megatron_prefix(prefix)
        with (
            pytest.raises(OSError, match=rf"clean {size}.*File too large|File too large.*clean {size}"),
            files_of_at_most(size),
        ):
            write_clean(tmp_path / "whole", out, CleanSpec(), [])
        assert not (out / "dataset.json").exists()
