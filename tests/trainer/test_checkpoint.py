"""Checkpoints by themselves: who waits for whom, what is kept, and what is optional."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from dryvine.comm import local
from dryvine.comm.mesh import make_mesh
from dryvine.trainer import checkpoint
from dryvine.trainer.checkpoint import CheckpointError

DELAY = 0.5


def mesh(ranks: int = 1) -> Any:
    return make_mesh(1, 1, ranks, 1, torch.device("cpu"), timedelta(seconds=60))


def piece(first: float, size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    values = torch.arange(first, first + size)
    return {"master": values.clone(), "exp_avg": (-values).to(dtype), "step": torch.tensor(5.0)}


def empty(size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"master": torch.zeros(size), "exp_avg": torch.zeros(size, dtype=dtype), "step": torch.tensor(0.0)}


def _delayed(rank: int, folder: Path) -> tuple[bool, bool]:
    """A save in which rank 0 is late twice. Whether the folder was there when this rank wrote into it, and whether the
    path that it got exists."""
    early, mkdir, rename, write = [], Path.mkdir, Path.rename, checkpoint.dcp.save

    def late_mkdir(path: Path, *given: Any, **more: Any) -> None:
        if path.suffix == ".part" and rank == 0:
            time.sleep(DELAY)
        mkdir(path, *given, **more)

    def late_rename(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            time.sleep(DELAY)
        return rename(path, target)

    def watched(*given: Any, **more: Any) -> Any:
        early.append(not (folder / "checkpoints" / "step-00000003.part").is_dir())
        return write(*given, **more)

    Path.mkdir, Path.rename, checkpoint.dcp.save = late_mkdir, late_rename, watched  # type: ignore[method-assign]
    path = checkpoint.save(folder, 3, {("w", 4 * rank): piece(4.0 * rank, 4)}, {}, 2, mesh(2))
    return early[0], path.exists()


def test_ranks_wait_for_the_folder_and_for_its_name(tmp_path: Path) -> None:
    assert local.run(_delayed, 2, tmp_path, deadline=100) == [(False, True)] * 2


def test_pieces_cut_elsewhere_get_their_own_elements(tmp_path: Path) -> None:
    """Stored as 0-3, 4-9; loaded as 0-1, 2-6, 7-9, and then as one; moments in another precision."""
    stored = {("w", 0): piece(0.0, 4), ("w", 4): piece(4.0, 6)}
    path = checkpoint.save(tmp_path, 9, stored, {"bias": torch.tensor([1.0, 2.0])}, 1, mesh())
    for cuts in ([(0, 2), (2, 5), (7, 3)], [(0, 10)], [(0, 4), (4, 6)]):
        live = {("w", start): empty(size, torch.bfloat16) for start, size in cuts}
        bias = torch.zeros(2)
        loaded = checkpoint.load(path, live, {"bias": bias}, mesh())
        assert loaded == checkpoint.Loaded(9, frozenset())
        assert bias.tolist() == [1.0, 2.0]
        for (_, start), fields in live.items():
            wanted = [float(i) for i in range(start, start + len(fields["master"]))]
            assert fields["master"].tolist() == wanted
            assert fields["exp_avg"].tolist() == [-value for value in wanted]
            assert float(fields["step"]) == 5


def test_optional_fields_may_be_missing_and_others_may_not(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {("w", 0): piece(0.0, 4)}, {}, 1, mesh())
    live = {("w", 0): empty(4) | {"ema": torch.full((4,), 7.0)}}
    loaded = checkpoint.load(path, live, {}, mesh(), optional=("ema", "exp_avg"))
    assert loaded.missing == {"ema"}
    assert live["w", 0]["ema"].tolist() == [7.0] * 4
    assert live["w", 0]["exp_avg"].tolist() == [-0.0, -1.0, -2.0, -3.0]
    with pytest.raises(CheckpointException, match="ema"):
        checkpoint.load(path, live, {}, mesh())


def test_an_optional_field_that_is_stored_is_read(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {("w", 0): piece(0.0, 4) | {"ema": torch.ones(4)}}, {}, 1, mesh())
    live = {("w", 0): empty(4) | {"ema": torch.zeros(4)}}
    assert not checkpoint.load(path, live, {}, mesh(), optional=("ema",)).missing
    assert live["w", 0]["ema"].tolist() == [1.0] * 4
    checkpoint.load(path, {("w", 0): empty(4)}, {}, mesh(), optional=("ema",))  # a run without an average


@pytest.mark.parametrize("start", [-2, 1, 8])
def test_elements_that_are_not_stored_are_named(tmp_path: Path, start: int) -> None:
    path = checkpoint.save(tmp_path, 1, {("w", 0): piece(0.0, 4)}, {}, 1, mesh())
    with pytest.raises(CheckpointError, match=f"does not hold w, elements {start} to {start + 4}"):
        checkpoint.load(path, {("w", start): empty(4)}, {}, mesh())


def test_the_newest_complete_one_is_found_and_old_ones_go(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (9, 10, 11):
        checkpoint.save(tmp_path, step, {("w", 0): piece(step, 4)}, {}, 2, mesh())
    (tmp_path / "checkpoints" / "step-00000012.part").mkdir()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000011"
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"step-00000010", "step-00000011", "step-00000012.part"}


def test_a_step_saved_twice_holds_the_second(tmp_path: Path) -> None:
    """As after a step that a stopped run had reached and saved before."""
    for value in (1.0, 2.0):
        path = checkpoint.save(tmp_path, 4, {("w", 0): piece(value, 3)}, {}, 2, mesh())
    live = {("w", 0): empty(3)}
    assert checkpoint.load(path, live, {}, mesh()).step == 4
    assert live["w", 0]["master"].tolist() == [2.0, 3.0, 4.0]
