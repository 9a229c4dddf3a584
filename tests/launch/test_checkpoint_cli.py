"""`dryvine checkpoint`: what is listed, what is found damaged, where two saves differ, and the exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from dryvine.launch.cli import app
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.manifest import CheckpointError
from tests.support.checkpoints import old, old_state, piece, save, state


def checkpoint(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["checkpoint", *map(str, words)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 4):
        layers = {("w", 0): piece(step, 8), ("v", 0): piece(1.0, 4)}
        save(tmp_path, step, state(layers, {"bias": torch.ones(2)}, w=(4, 1, 2)))
    return tmp_path


def test_ls_lists_what_there_is_and_says_what_is_damaged(run: Path) -> None:
    listed = checkpoint("ls", run)
    assert listed.exit_code == 0
    first, second = (line.replace("│", " ").split() for line in listed.stdout.splitlines() if "step-0" in line)
    assert first[:4] == ["step-00000002", "2", "2", "1"]
    assert "newest" in second
    assert "newest" not in first
    (run_folder.named(run, 2) / "manifest.json").write_text("{")
    listed = checkpoint("ls", run)
    assert listed.exit_code == 1
    assert "manifest.json: damaged" in listed.stdout


def test_ls_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run folder with a checkpoint"):
        CliRunner().invoke(app, ["checkpoint", "ls", str(tmp_path)], catch_exceptions=False)


def test_verify_counts_what_is_sound_and_names_what_is_not(run: Path) -> None:
    done = checkpoint("verify", run)
    assert done.exit_code == 0
    assert "step-00000004: sound: step 4, 2 parameters, 7 tensors, 4 experts in 1 stacks" in done.stdout
    file = run_folder.named(run, 2) / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert checkpoint("verify", run).exit_code == 0
    done = checkpoint("verify", run, "--all")
    assert done.exit_code == 1
    assert "step-00000002/rank-00000.safetensors: damaged: " in done.stdout
    assert "step-00000004: sound" in done.stdout


def test_diff_names_the_tensors_that_differ_and_by_how_much(run: Path) -> None:
    two, four = run_folder.named(run, 2), run_folder.named(run, 4)
    same = checkpoint("diff", two, two)
    assert same.exit_code == 0
    assert "7 of 7 tensors are the same bits" in same.stdout
    other = checkpoint("diff", two, four)
    assert other.exit_code == 1
    assert "5 of 7 tensors are the same bits" in other.stdout
    (row,) = (line.split() for line in other.stdout.splitlines() if "w: master" in line)
    # 2..9 against 4..11: all differ by 2; the norm of the first is that of 2..9.
    assert [word for word in row if word[0].isdigit()] == ["8", "8", "2", f"{(8 * 4 / 284) ** 0.5:.3g}"]


def test_diff_reads_other_cuts_and_the_old_format(tmp_path: Path) -> None:
    path = old(tmp_path / "old", 7, old_state())
    one = piece(0.0, 10, torch.bfloat16)
    new = save(tmp_path / "new", 7, state({("w", 0): one}, {"bias": torch.tensor([1.0, 2.0])}))
    compared = checkpoint("diff", path, new)
    assert compared.exit_code == 0, compared.stdout
    assert "4 of 4 tensors are the same bits" in compared.stdout
    listed = checkpoint("verify", path)
    assert listed.exit_code == 0
    assert "format 1 has no checksums" in listed.stdout
