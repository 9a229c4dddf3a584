"""The Triton kernels without a GPU: under the interpreter, and compiled for Hopper, each in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import triton_scripts as helpers_triton

pytestmark = pytest.mark.skipif(not helpers_triton.PRESENT, reason="triton is for Linux only")


@helpers_triton.every_case
def test_every_bit_agrees_under_the_interpreter(every: bool) -> None:
    helpers_triton.interpret("fp8_interpreted.py", every)


compiled = helpers_triton.compiled("fp8_compiled")

# What they read is in FP8 already: they move bytes and cast none.
MOVES = {"pack_kernel", "unpack_kernel", "transpose_blocks_kernel"}


def test_products_use_hoppers_own_instructions(compiled: list[dict[str, Any]]) -> None:
    products = [k for k in compiled if k["kernel"].startswith("hopper.")]
    assert len(products) == 3
    for kernel in products:
        assert all(kind.endswith(".f32.e4m3.e4m3") for kind in kernel["wgmma"]), kernel
        assert sum(kernel["wgmma"].values()) >= 4, kernel  # 128 of K is four instructions of 32
        assert kernel["tma"] >= 2, kernel
        # The few words that spill lie outside the loop over K; more would be inside.
        assert kernel["stack"] <= 64, kernel


def test_quantisers_cast_in_hardware_and_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    quantisers = [k for k in compiled if k["kernel"].split(".")[0] in ("casts", "fused")]
    assert len(quantisers) >= 9
    for kernel in quantisers:
        name = kernel["kernel"].partition(".")[2]
        assert kernel["stack"] <= 24, kernel  # addresses; holding them all costs more in threads
        if name not in MOVES and kernel["constants"].get("CAST", True):
            assert kernel["cast"], kernel


def test_every_kernel_fits_an_sm(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["shared"] <= helpers_triton.HOPPER_SHARED, kernel
        if not kernel["kernel"].startswith("hopper."):  # Gluon's warps have shares of their own
            helpers_triton.assert_registers_fit(kernel)
