"""Inputs that the system cannot read: named, and never taken for files that end there."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.readers.table import kind_of
from dryvine.trainer.data.spec import BuildSpec
from tests.support.built import contents
from tests.support.records import write_rows

SPEC = BuildSpec(vocab_size=300, field="meta.text", validation_fraction=0)
UNREADABLE = Path("/proc/self/mem")  # opens, but reading its first bytes raises EIO


@pytest.mark.skipif(not UNREADABLE.exists(), reason="needs /proc")
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_an_input_that_the_disk_cannot_read_ends_the_build_with_its_name(tmp_path: Path, suffix: str) -> None:
    write_rows(tmp_path / "a.jsonl")
    (tmp_path / f"b{suffix}").symlink_to(UNREADABLE)
    inputs = match_files([f"{tmp_path}/*"])
    with pytest.raises(DataError, match=rf"b{suffix}: Input/output error; fix that, and run the same command again"):
        build(inputs, SPEC, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz"])
def test_a_network_that_is_gone_for_a_while_costs_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """In the pass that packs, in the middle of a file; the same command then ends in the same bytes."""
    write_rows(tmp_path / f"rows{suffix}")
    inputs = match_files([f"{tmp_path}/rows*"])
    build(inputs, SPEC, tmp_path / "whole")
    with monkeypatch.context() as gone:
        _fail_after_the_first_rows(gone)
        with pytest.raises(DataError, match=rf"rows{suffix}: Stale file handle"):
            build(inputs, BuildSpec(tokenizer=tmp_path / "whole" / "tokenizer.json", field="meta.text"), tmp_path / "b")
        with pytest.raises(OSError, match="Stale"):
            kind_of(inputs[0].path).text_bytes(inputs[0].path, "meta.text")
        with pytest.raises(DataError, match=rf"rows{suffix}: Stale file handle"):
            build(inputs, SPEC, tmp_path / "out")
    build(inputs, SPEC, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _stale() -> OSError:
    return OSError(errno.ESTALE, "Stale file handle")


class _Stale(io.FileIO):
    """A file of which only the first bytes can be read."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise _stale()
        return super().read(30) or b""


def _fail_after_the_first_rows(gone: pytest.MonkeyPatch) -> None:
    iter_batches, python_file = pq.ParquetFile.iter_batches, pa.PythonFile

    def batches(*asked: object, **how: object) -> Iterator[object]:
        yield next(iter_batches(*asked, **how))
        raise _stale()

    gone.setattr(pq.ParquetFile, "iter_batches", batches)
    gone.setattr(pa, "PythonFile", lambda raw, mode: python_file(_Stale(raw.name), mode))
