"""The Triton kernels without a GPU: under the interpreter, and compiled for Hopper, each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is for Linux only")
HOPPER_SHARED = 227 * 1024


def run(*command: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, *command], env=clean | environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_bit_agrees_under_the_interpreter() -> None:
    said = run("-m", "pytest", str(HERE / "fp8_interpreted.py"), "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    assert "[100%]" in said


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("triton")
    lines = run(str(HERE / "fp8_compiled.py"), str(folder), TRITON_CACHE_DIR=str(folder / "cache"))
    return [json.loads(line) for line in lines.splitlines()]


def test_products_use_hoppers_own_instructions(compiled: list[dict[str, Any]]) -> None:
    products = [k for k in compiled if k["kernel"].split(".")[0] in ("hopper", "plain")]
    assert len(products) == 5
    for kernel in products:
        assert kernel["wgmma"] >= 4, kernel  # 128 of K is four instructions of 32
        assert kernel["tma"] >= 2, kernel
        assert kernel["shared"] <= HOPPER_SHARED, kernel
        # The few words that spill lie outside the loop over K; more would be inside.
        assert kernel["stack"] <= 64, kernel


def test_quantisers_cast_in_hardware_and_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        room, _, name = kernel["kernel"].partition(".")
        if room in ("cast", "fused") and name != "swiglu_backward_kernel":
            assert kernel["stack"] == 0, kernel
        if room in ("cast", "fused") and "pack" not in name:
            assert kernel["cast"], kernel
        if room in ("cast", "fused"):
            assert kernel["registers"] <= 255, kernel
