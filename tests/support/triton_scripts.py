"""Kernels in a process of their own, with triton's environment as they need it, by each triton that is supported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dryvine.comm.integers import round_up

ROOT = Path(__file__).parents[2]
PRESENT = importlib.util.find_spec("triton") is not None
INSTALLED = importlib.metadata.version("triton") if PRESENT else "none"
OTHER = "3.6.0"  # goes with torch 2.11; `make setup-test` puts it beside the installed one
HOPPER_SHARED = 227 * 1024  # bytes that a block can have
HOPPER_REGISTERS = 65536  # of an SM


def run(*command: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


# The interpreter takes seconds a case: all of them are for the long tests.
every_case = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])


def interpret(tests: str, every: bool) -> None:
    """The tests of a file of tests/spawned/, under the interpreter: every case, or the first of each test."""
    cases = () if every else ("-p", "tests.support.first_cases")
    output = run("-m", "pytest", f"tests/spawned/{tests}", "-p", "no:cacheprovider", *cases, TRITON_INTERPRET="1")
    assert "[100%]" in output


def compile_by(version: str, script: str, folder: Path) -> list[dict[str, Any]]:
    """What a script of tests/spawned/ prints of its kernels, compiled by triton `version`; `folder` is its cache."""
    other = ROOT / ".venv" / f"triton-{OTHER}"
    paths = {}
    if version != INSTALLED:
        if not other.is_dir():
            pytest.skip(f"no triton {OTHER}: make setup-test")
        paths = {"PYTHONPATH": os.pathsep.join((str(other), os.environ.get("PYTHONPATH", "")))}
    lines = run("-m", f"tests.spawned.{script}", TRITON_CACHE_DIR=str(folder), **paths)
    kernels = [json.loads(line) for line in lines.splitlines()]
    assert {kernel["triton"] for kernel in kernels} == {version}
    return kernels


def compiled(script: str) -> Any:
    """A fixture: every kernel of a script, by the triton of this torch and by that of the oldest torch we support. A
    minute each: for the long tests."""

    @pytest.fixture(scope="module", params=[pytest.param(v, marks=pytest.mark.long) for v in (INSTALLED, OTHER)])
    def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
        return compile_by(request.param, script, tmp_path_factory.mktemp("triton"))

    return kernels


def assert_registers_fit(kernel: dict[str, Any]) -> None:
    """Rounded up to 8 a thread, as the hardware hands registers out."""
    assert 32 * kernel["warps"] * round_up(kernel["registers"], 8) <= HOPPER_REGISTERS, kernel
