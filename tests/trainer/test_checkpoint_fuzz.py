"""Every byte of a checkpoint counts: one that is flipped, cut off or missing is refused with its file's name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dryvine.trainer.checkpoint.load import newest_sound
from dryvine.trainer.checkpoint.manifest import CheckpointError
from tests.support.checkpoints import mesh, piece, save, state


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run folder with one checkpoint, of FP32, BF16, a value without dimensions and a buffer."""
    pieces = {("w", 0): piece(0.0, 6, torch.bfloat16), ("layers.0.experts.down", 0): piece(3.0, 8)}
    shapes = {"layers.0.experts.down": (2, 2, 2)}
    save(tmp_path, 3, state(pieces, {"layers.0.gate.bias": torch.tensor([0.5, -0.5])}, **shapes))
    assert newest_sound(tmp_path, mesh(), "stop").reader is not None
    return tmp_path


def files(folder: Path) -> list[Path]:
    found = sorted((folder / "checkpoints" / "step-00000003").iterdir())
    assert [path.name for path in found] == ["manifest.json", "rank-00000.safetensors"]
    return found


def refused(folder: Path, file: Path) -> bool:
    try:
        newest_sound(folder, mesh(), "stop")
    except CheckpointError as error:
        return file.name in str(error)
    return False


def flips(content: bytes, stride: int) -> Iterator[tuple[int, bytes]]:
    """Where, and the content with one bit of that byte flipped."""
    for at in range(0, len(content), stride):
        yield at, content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]


def test_every_flipped_byte_is_found(saved: Path, count: Callable[[int, int], int]) -> None:
    for file in files(saved):
        content = file.read_bytes()
        for at, damaged in flips(content, count(7, 1)):
            file.write_bytes(damaged)
            assert refused(saved, file), f"{file.name}, byte {at}"
        file.write_bytes(content)
    assert newest_sound(saved, mesh(), "stop").reader is not None


def test_every_length_but_its_own_is_found(saved: Path, count: Callable[[int, int], int]) -> None:
    for file in files(saved):
        content = file.read_bytes()
        for length in [*range(0, len(content), count(13, 1)), len(content) - 1]:
            file.write_bytes(content[:length])
            assert refused(saved, file), f"{file.name}, {length} of {len(content)} bytes"
        for more in (b"\0", b"\n", content):
            file.write_bytes(content + more)
            assert refused(saved, file), f"{file.name} with {len(more)} bytes more"
        file.write_bytes(content)


def test_a_missing_file_is_found_and_a_stray_one_ignored(saved: Path) -> None:
    for file in files(saved):
        aside = file.rename(saved / "aside")
        assert refused(saved, file)
        aside.rename(file)
    (files(saved)[0].parent / "notes.txt").write_text("ours")
    assert newest_sound(saved, mesh(), "stop").reader is not None


def test_a_file_of_another_checkpoint_is_found(saved: Path, tmp_path: Path) -> None:
    """Of the same sizes and names, and sound in its own."""
    pieces = {("w", 0): piece(1.0, 6, torch.bfloat16), ("layers.0.experts.down", 0): piece(3.0, 8)}
    buffers = {"layers.0.gate.bias": torch.tensor([0.5, -0.5])}
    other = save(tmp_path / "other", 3, state(pieces, buffers, **{"layers.0.experts.down": (2, 2, 2)}))
    for name in ("rank-00000.safetensors", "manifest.json"):
        target = saved / "checkpoints" / "step-00000003" / name
        content = target.read_bytes()
        shutil.copy(other / name, target)
        with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: damaged: w@0/"):
            newest_sound(saved, mesh(), "stop")
        target.write_bytes(content)
