"""The build of DeepSpeed's CPU Adam that hangs, fails, or was killed: torch's is used instead, with the reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dryvine.trainer.cpu_adam import load_cpu_adam
from tests.support.processes import wait_until_ended

Builder = Callable[[str], object]
BUILDER = """
import os, pathlib, subprocess, time
class CPUAdamBuilder:
    def load(self, verbose):
        {body}
"""
MADE = """made = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam" / "cpu_adam.so"
        made.parent.mkdir(); made.write_text("no library"); open("{log}", "a").write("built ")"""


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """Puts a stand-in in DeepSpeed's place, and an empty cache in the user's."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "deepspeed" / "ops").mkdir(parents=True)
    for folder in ("deepspeed", "deepspeed/ops"):
        (tmp_path / folder / "__init__.py").touch()
    return lambda body: (tmp_path / "deepspeed/ops/op_builder.py").write_text(BUILDER.format(body=body))


def test_a_build_that_hangs_ends_with_its_compilers(builder: Builder, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    builder(f'child = subprocess.Popen(["sleep", "300"]); open("{pid}", "w").write(str(child.pid)); child.wait()')
    why = load_cpu_adam(limit=2.0)
    assert why == "RuntimeError: not compiled within 2 s"
    wait_until_ended([pid.read_text()])


def test_a_build_that_fails_says_its_last_line(builder: Builder) -> None:
    builder('raise RuntimeError("no compiler")')
    assert load_cpu_adam() == "RuntimeError: RuntimeError: no compiler"


def test_what_was_built_is_kept(builder: Builder, tmp_path: Path) -> None:
    log = tmp_path / "log"
    builder(MADE.format(log=log))
    for _ in range(2):
        assert "ImportError" in str(load_cpu_adam())  # the stand-in makes no library
    assert log.read_text() == "built "


def test_a_killed_builder_is_in_nobodys_way(builder: Builder, tmp_path: Path) -> None:
    builder("time.sleep(30)")
    held = subprocess.Popen([sys.executable, "-c", "from dryvine.trainer.cpu_adam import load_cpu_adam as f; f()"],
                            process_group=0)  # fmt: skip
    try:
        while not list((tmp_path / "cache/dryvine").glob("cpu_adam-*/tmp*")):
            assert held.poll() is None
        waiting = load_cpu_adam(limit=0.5)
    finally:
        os.kill(held.pid, signal.SIGKILL)
        held.wait()
    assert waiting == "RuntimeError: another process has been compiling it for 0.5 s"
    builder(MADE.format(log=tmp_path / "log"))
    assert "ImportError" in str(load_cpu_adam(limit=30.0))
