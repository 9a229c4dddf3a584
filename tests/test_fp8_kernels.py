"""The Triton kernels without a GPU: under the interpreter, and compiled for Hopper, each in a process of its own."""

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

HERE = Path(__file__).parent
ROOT = HERE.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is for Linux only")
HOPPER_SHARED = 227 * 1024  # bytes that a block can have
HOPPER_REGISTERS = 65536  # of an SM
INSTALLED = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
OTHER = "3.6.0"  # goes with torch 2.11; `make setup-test` puts it beside the installed one


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


@pytest.fixture(scope="module", params=[INSTALLED, OTHER])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every kernel, by the triton of this torch and by that of the oldest torch we support."""
    folder, other = tmp_path_factory.mktemp("triton"), ROOT / ".venv" / f"triton-{OTHER}"
    paths = {}
    if request.param != INSTALLED:
        if not other.is_dir():
            pytest.skip(f"no triton {OTHER}: make setup-test")
        paths = {"PYTHONPATH": os.pathsep.join((str(other), os.environ.get("PYTHONPATH", "")))}
    lines = run(str(HERE / "fp8_compiled.py"), str(folder), TRITON_CACHE_DIR=str(folder / "cache"), **paths)
    kernels = [json.loads(line) for line in lines.splitlines()]
    assert {kernel["triton"] for kernel in kernels} == {request.param}
    return kernels


def test_products_use_hoppers_own_instructions(compiled: list[dict[str, Any]]) -> None:
    products = [k for k in compiled if k["kernel"].split(".")[0] in ("hopper", "plain")]
    assert len(products) == 5
    for kernel in products:
        assert kernel["wgmma"] >= 4, kernel  # 128 of K is four instructions of 32
        assert kernel["tma"] >= 2, kernel
        # The few words that spill lie outside the loop over K; more would be inside.
        assert kernel["stack"] <= 64, kernel


def test_quantisers_cast_in_hardware_and_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    quantisers = [k for k in compiled if k["kernel"].split(".")[0] in ("cast", "fused")]
    assert len(quantisers) >= 9
    for kernel in quantisers:
        name = kernel["kernel"].partition(".")[2]
        assert kernel["stack"] <= 8, kernel  # one address, outside the loops
        if "pack" not in name and kernel["constants"].get("CAST", True):
            assert kernel["cast"], kernel


def test_every_kernel_fits_an_sm(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["shared"] <= HOPPER_SHARED, kernel
        # Rounded up to 8 a thread, as the hardware hands registers out. Gluon's warps have shares of their own.
        if not kernel["kernel"].startswith("hopper."):
            assert 32 * kernel["warps"] * (-(-kernel["registers"] // 8) * 8) <= HOPPER_REGISTERS, kernel
