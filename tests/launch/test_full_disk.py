"""A disk that is full at any write of a run: the file is named, nothing saved is lost; with room the run goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dryvine.launch import spawn as module
from dryvine.launch.spawn import Launch, spawn
from dryvine.trainer import journal
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.inspect import compare, damage
from dryvine.trainer.checkpoint.reader import open_checkpoint
from dryvine.trainer.exit_codes import ExitCode
from tests.support.quick_ranks import Attempts

TINY = str(Path(__file__).parents[1] / "tiny.toml")
STEPS = 6


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """64 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)), capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(("umount", "-l", str(disk)), check=True)


def train(monkeypatch: pytest.MonkeyPatch, corpus: Path, out: Path, log: Path) -> int:
    settings = ("model.layers=3", "batch.sequences=4", f"run.steps={STEPS}", "run.checkpoint_every=2")
    words = (TINY, f'data.source="{corpus}"', f'run.out="{out}"', *settings, "parallel.pp=2", "run.eval_every=9")
    attempts = Attempts(str(log))
    monkeypatch.setattr(module, "_start", attempts.start)
    return spawn(Launch(2, words, deadline=100.0))


def fill(disk: Path, free: int) -> Path:
    """Leave so many bytes free."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, shutil.disk_usage(disk).free - free))
    return ballast


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_full_disk_loses_nothing_at_any_write(
    corpus: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: Callable[[int, int], int]
) -> None:
    assert train(monkeypatch, corpus, tmp_path / "calm", tmp_path / "log.txt") == 0
    calm = tmp_path / "calm" / "tiny"
    needed = sum(file.stat().st_size for file in calm.rglob("*") if file.is_file())
    tries, ends = count(4, 40), dict[str, int]()
    for number in range(tries):
        out, log = small_disk / f"try{number}", tmp_path / f"log{number}.txt"
        free = needed * 2 * number // tries
        ballast = fill(small_disk, free)
        code = train(monkeypatch, corpus, out, log)
        text = log.read_text()
        if code:
            assert code == ExitCode.FAULT, text
            named = re.search(rf"{re.escape(str(out / 'tiny'))}[^\n]*: No space left on device", text)
            assert named, text
        for path in run_folder.complete(out / "tiny"):
            assert not list(damage(open_checkpoint(path), lambda read: None))
        ends["whole" if not code else f"step {len(journal.read(out / 'tiny'))}"] = free
        ballast.unlink()
        assert train(monkeypatch, corpus, out, log) == 0, log.read_text()
        assert compare(open_checkpoint(calm), open_checkpoint(out / "tiny"), lambda read: None).alike
        losses = [[row["loss"] for row in journal.read(folder)] for folder in (calm, out / "tiny")]
        assert losses[0] == losses[1]
        shutil.rmtree(out)
    print(json.dumps(ends))
    assert len(ends) > 1
