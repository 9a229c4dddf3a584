"""One run at a time in a folder: the living keep their lock, the dead do not, here and on another host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dryvine.trainer import run_lock
from dryvine.trainer.config import ConfigError
from dryvine.trainer.run_lock import NAME, RunLock


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "STALE", 0.6)


def of_another(folder: Path, **changes: object) -> Path:
    """Rewrite the lock as if somebody else held it."""
    file = folder / NAME
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content))
    return file


def test_a_second_run_is_refused_at_once_with_the_holder_named(tmp_path: Path) -> None:
    with RunLock(tmp_path).held() as lock:
        started = time.monotonic()
        with (
            pytest.raises(ConfigError, match=f"already in progress, process {os.getpid()} on .*set run.name"),
            RunLock(tmp_path).held(),
        ):
            pass
        assert time.monotonic() - started < run_lock.STALE
        assert lock.mine
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from dryvine.trainer.run_lock import RunLock
with RunLock(Path(sys.argv[1])).held():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_is_not_in_the_way(tmp_path: Path) -> None:
    with subprocess.Popen((sys.executable, "-c", HOLD, str(tmp_path)), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid}"), RunLock(tmp_path).held():
            pass
        holder.kill()
        holder.wait()
        with RunLock(tmp_path).held(pytest.fail) as lock:
            assert lock.mine


def test_a_process_id_used_again_is_not_its_holder(tmp_path: Path) -> None:
    with RunLock(tmp_path).held():
        of_another(tmp_path, started="1", token="old")
        with RunLock(tmp_path).held(pytest.fail) as second:
            assert second.mine


def test_a_dead_host_is_waited_for_and_then_not_in_the_way(tmp_path: Path) -> None:
    said: list[str] = []
    with RunLock(tmp_path).held() as lock:
        of_another(tmp_path, host="node7", machine="another boot", token="theirs")
        started = time.monotonic()
        with RunLock(tmp_path).held(said.append) as second:
            assert time.monotonic() - started >= run_lock.STALE
            assert second.mine
            assert not lock.mine
    assert "on node7; waiting" in said[0]


def test_a_living_host_keeps_its_lock(tmp_path: Path) -> None:
    over = threading.Event()

    def beat() -> None:
        beats = 0
        while not over.wait(0.05):
            beats += 1
            of_another(tmp_path, beats=beats)

    with RunLock(tmp_path).held():
        of_another(tmp_path, host="node7", machine="another boot", token="theirs")
        thread = threading.Thread(target=beat)
        thread.start()
        try:
            with pytest.raises(ConfigError, match="on node7"), RunLock(tmp_path).held(lambda line: None):
                pass
        finally:
            over.set()
            thread.join()


def test_a_holder_shows_life(tmp_path: Path) -> None:
    with RunLock(tmp_path).held():
        before = json.loads((tmp_path / NAME).read_text())["beats"]
        time.sleep(0.4)
        assert json.loads((tmp_path / NAME).read_text())["beats"] > before


def test_an_empty_or_foreign_file_of_that_name_is_no_lock(tmp_path: Path) -> None:
    for content in ("", "[]", '{"pid": 1}'):
        (tmp_path / NAME).write_text(content)
        with RunLock(tmp_path).held(pytest.fail) as lock:
            assert lock.mine


def _take(folder: Path, wins: list[int]) -> None:
    try:
        with RunLock(folder).held():
            wins.append(1)
            until = time.monotonic() + 60
            while len(wins) < 8 and time.monotonic() < until:  # whoever comes late finds the lock taken, too
                time.sleep(0.02)
    except ConfigError:
        wins.append(0)


def test_of_many_that_find_a_dead_holder_one_gets_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path).held():
        of_another(tmp_path, started="1", token="old")
        wins: list[int] = []
        threads = [threading.Thread(target=_take, args=(tmp_path, wins)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(wins) == [0] * 7 + [1]


def test_a_run_that_does_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run").held():
        pass
    assert not (tmp_path / "run").exists()
    with RunLock(tmp_path / "run").held():
        (tmp_path / "run" / "config.toml").write_text("")
    assert (tmp_path / "run" / "config.toml").exists()
