"""The model's Triton kernels without a GPU: under the interpreter, and compiled for Hopper."""

from __future__ import annotations

from typing import Any

import pytest

from tests import helpers_triton

pytestmark = pytest.mark.skipif(not helpers_triton.PRESENT, reason="triton is for Linux only")
SUMS = ("norm.norm_weight_kernel", "loss.logsumexp_kernel")  # store a number where others store a tensor


def test_definitions_are_met_under_the_interpreter() -> None:
    helpers_triton.interpret("model_interpreted.py")


compiled = helpers_triton.compiled("model_compiled.py")


def test_compiled_kernels_move_wide_words_and_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    assert len(compiled) == 9
    for kernel in compiled:
        assert kernel["stack"] == 0, kernel
        assert kernel["registers"] <= 128, kernel
        loads, stores = kernel["widest"]
        wide = 7 if kernel["kernel"].startswith("heads.") else 1
        assert loads.count(16) >= wide, kernel
        assert stores.count(16) >= wide or kernel["kernel"] in SUMS, kernel
        assert kernel["shared"] <= helpers_triton.HOPPER_SHARED, kernel
        helpers_triton.assert_registers_fit(kernel)
