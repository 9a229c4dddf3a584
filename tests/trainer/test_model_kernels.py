"""The model's Triton kernels without a GPU: under the interpreter, and compiled for Hopper."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import triton_scripts as helpers_triton

pytestmark = pytest.mark.skipif(not helpers_triton.PRESENT, reason="triton is for Linux only")
NORM, WIDEST = "norm.norm_backward_kernel", 32_768  # elements of a row that it takes at once, and spills
SUM = "loss.logsumexp_kernel"  # stores a number where others store a tensor


@helpers_triton.every_case
def test_definitions_are_met_under_the_interpreter(every: bool) -> None:
    helpers_triton.interpret("model_interpreted.py", every)


compiled = helpers_triton.compiled("model_compiled")


def test_compiled_kernels_move_wide_words_and_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    plain = [
        kernel
        for kernel in compiled
        if not kernel["wgmma"]
        and not kernel["kernel"].startswith("gate.")
        and kernel["constants"].get("BLOCK") != WIDEST
    ]
    assert len(plain) == 18
    for kernel in plain:
        assert kernel["stack"] == 0, kernel
        assert kernel["registers"] <= 128, kernel
        loads, stores = kernel["widest"]
        wide = 7 if kernel["kernel"].startswith("qkv.") else 1
        assert loads.count(16) >= wide, kernel
        assert stores.count(16) >= wide or kernel["kernel"] == SUM, kernel
        helpers_triton.assert_registers_fit(kernel)


def test_shared_memory_holds_what_kernels_keep_there_whatever_their_sizes(compiled: list[dict[str, Any]]) -> None:
    assert {kernel["kernel"] for kernel in compiled if kernel["constants"].get("BLOCK") == WIDEST} == {NORM}
    assert all(kernel["shared"] <= helpers_triton.HOPPER_SHARED for kernel in compiled)


def test_weight_gradients_of_experts_use_the_widest_product_and_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    (kernel,) = (kernel for kernel in compiled if kernel["kernel"] == "grouped.wgrad_kernel")
    # Two warpgroups, each with whole blocks of 64 rows and a last one that is not: four instructions of 16 rows.
    assert kernel["wgmma"] == {"m64n256k16.f32.bf16.bf16": 2 * 2 * 4}, kernel
    # A row of 128 bytes is the widest that shared memory swizzles; sums pass in 8 chunks to each warpgroup and back.
    assert kernel["tma"] == 2 + 256 // 64 + 2 * (8 + 8), kernel
    assert kernel["stack"] == 0, kernel


def test_gates_of_any_size_compile_and_stay_in_registers(compiled: list[dict[str, Any]]) -> None:
    """A gate's program is one warp; V3's logits are read, and their gradients written, in whole words."""
    gates = [kernel for kernel in compiled if kernel["kernel"].startswith("gate.")]
    assert len(gates) == 7 * 3 - 2
    assert all(kernel["stack"] == 0 and kernel["warps"] == 1 for kernel in gates)
    forward, backward = (kernel["widest"] for kernel in gates[:2])
    elements = 4 * 256 // 32  # of a thread
    assert forward[0].count(16) >= elements // 4
    assert backward[0].count(16) >= elements // 4
    assert backward[1].count(16) == len(backward[1]) == elements // 4
