"""Compiles every FP8 kernel for sm_90 without a GPU and prints what came out, one JSON line each. Run by
test_fp8_kernels.py: the kernels must be defined with TRITON_INTERPRET unset, which is another process."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from triton.experimental.gluon import language as gl

from dryvine.trainer.fp8.kernels import casts as cast_kernels
from dryvine.trainer.fp8.kernels import fused as fused_kernels
from dryvine.trainer.fp8.kernels import hopper
from dryvine.trainer.tensors import sums
from tests.support.compile import compile_for_hopper, sums_type

FP8 = "fp8e4nv"
# What is known of arguments at a real launch: pointers and these sizes are multiples of 16.
ALIGNED = frozenset({"M", "N", "K", "R", "C", "F", "P", "x_stride", "c_stride", "sa_stride", "sb_stride"})
SCALES = {"s": "fp32", "st": "fp32", "xs": "fp32", "ks": "fp32", "acts": "fp32", "sa": "fp32", "sb": "fp32"}
VALUES = {"q": FP8, "qt": "i32", "saved": FP8, "act": "i32", "table": "i32", "starts": "i32", "live": "i32"}
OTHERS = {"weights": "fp32", "dw": "fp32", "x": "bf16", "h": "bf16", "dy": "bf16", "w": "fp32", "weight": "bf16",
          "normed": "bf16", "inverse": "fp32", "high": "u8", "low": "u8", "c": "bf16"}  # fmt: skip


def compile_one(
    kernel: Any, constants: dict[str, Any], warps: int, maxnreg: int | None = None, **types: str
) -> dict[str, Any]:
    pointers = SCALES | VALUES | OTHERS

    def kind(name: str) -> str:
        if name in types:
            return types[name]
        return f"*{pointers[name]}" if name in pointers else "fp32" if name == "eps" else "i32"

    return compile_for_hopper(
        kernel, {name: kind(name) for name in kernel.arg_names if name not in constants}, constants, ALIGNED, warps,
        maxnreg, fusion=kernel.is_gluon(),
    )  # fmt: skip


def descriptors(width: int) -> dict[str, str]:
    layout = repr(gl.NVMMASharedLayout(128, 8, rank=2))
    return {"a_desc": f"tensordesc<{FP8}[64,128],{layout}>", "b_desc": f"tensordesc<{FP8}[{width},128],{layout}>"}


def constants(config: hopper.TileConfig, **more: Any) -> dict[str, Any]:
    return {field.upper(): value for field, value in asdict(config).items()} | more


def products() -> Any:
    config = hopper.PRODUCT
    for grouped in (False, True):
        yield compile_one(hopper.product_kernel, constants(config, GROUPED=grouped), 4, **descriptors(config.sub))
    config = hopper.WGRAD
    types = descriptors(config.sub)
    yield compile_one(hopper.wgrad_kernel, constants(config, RING=sums.RING), 4, **types, c_desc=sums_type())


def quantisers() -> Any:
    yield compile_one(cast_kernels.rows_kernel, {"UE8M0": False, "ROWS": cast_kernels.ROWS}, 4)
    yield compile_one(cast_kernels.columns_kernel, {"ROWS_TOO": True, "GROUPED": True, "UE8M0": True}, 8, 128)
    yield compile_one(cast_kernels.columns_kernel, {"ROWS_TOO": False, "GROUPED": True, "UE8M0": False}, 8, 80)
    turn = {"C": 7168, "GROUPED": True, "UE8M0": True, "WORDS": cast_kernels.TRANSPOSE_WORDS}
    yield compile_one(cast_kernels.transpose_kernel, turn, 4, 96, x=f"*{FP8}")
    yield compile_one(cast_kernels.blocks_kernel, {"UE8M0": False}, 8)
    yield compile_one(cast_kernels.transpose_blocks_kernel, {}, 8, q="*u8")
    yield compile_one(cast_kernels.pack_kernel, {"ROWS": cast_kernels.ROWS}, 4)
    yield compile_one(cast_kernels.unpack_kernel, {"ROWS": cast_kernels.ROWS}, 4)
    ffn = {"F": 2048, "WEIGHTED": True, "UE8M0": False}
    yield compile_one(fused_kernels.swiglu_kernel, ffn | {"ROWS": fused_kernels.ROWS}, 4)
    yield compile_one(fused_kernels.swiglu_backward_kernel, ffn | {"WORDS": 8}, 4, 128)
    yield compile_one(fused_kernels.rmsnorm_kernel, {"UE8M0": False, "TILES": 64}, 8)


if __name__ == "__main__":
    for made in (*products(), *quantisers()):
        print(json.dumps(made), flush=True)
