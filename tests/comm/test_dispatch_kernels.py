"""Comm's Triton kernels without a GPU: under the interpreter, and compiled for Hopper, each in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import triton_scripts as helpers_triton

pytestmark = pytest.mark.skipif(not helpers_triton.PRESENT, reason="triton is for Linux only")


@helpers_triton.every_case
def test_every_bit_agrees_under_the_interpreter(every: bool) -> None:
    helpers_triton.interpret("comm_interpreted.py", every)


compiled = helpers_triton.compiled("comm_compiled")


def test_nothing_spills_and_two_blocks_fit_an_sm(compiled: list[dict[str, Any]]) -> None:
    assert len({kernel["kernel"] for kernel in compiled}) == 8
    for kernel in compiled:
        assert kernel["stack"] == 0, kernel
        assert 2 * 32 * kernel["warps"] * kernel["registers"] <= helpers_triton.HOPPER_REGISTERS, kernel
        assert 2 * kernel["shared"] <= helpers_triton.HOPPER_SHARED, kernel


def test_rows_move_sixteen_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    """A sum's loads are as many as fit its eight addends: none waits for an earlier one's turn of a loop."""
    moving = [kernel for kernel in compiled if kernel["constants"].get("COLS", 0) >= 8]  # in BF16 16 bytes
    assert len(moving) == 6 * 8
    for kernel in moving:
        vectors = {("sum_kernel", 8): 1, ("sum_kernel", 4): 2, ("gather_kernel", 2): 4}  # a thread's, of a row
        loads, stores = kernel["widest"]
        wanted = vectors[kernel["kernel"].partition(".")[2], kernel["constants"]["VEC"]]
        assert loads.count(16) == wanted * kernel["constants"].get("MOST", 1), kernel
        assert stores.count(16) == len(stores) == wanted, kernel
        if kernel["constants"]["ROWS"] == 1:  # indexes are read once, not again for each element of a row
            ends = 0 if kernel["constants"].get("EVEN") else 2
            assert len(loads) - loads.count(16) == kernel["constants"].get("MOST", -1) + ends, kernel
