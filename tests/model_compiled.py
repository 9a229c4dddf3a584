"""Compiles the model's own kernels for sm_90 without a GPU, at V3's sizes, and prints what came out as JSON lines.
Run by test_model_kernels.py: the kernels must be defined with TRITON_INTERPRET unset, which is another process."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from helpers_compile import compile_for_hopper
from triton.experimental.gluon import language as gl

from dryvine.trainer.model.kernels import gated, grouped, heads, loss, norm

V3 = {"A": 128, "NOPE": 128, "PAIRS": 32, "V": 128, "NOPE2": 128, "PAIRS2": 32}
TABLES = {"cos": "*fp32", "sin": "*fp32", "T": "i32"}
FORWARD = ("q_stride", "kv_stride", "k_rope_stride")
BACKWARD = tuple(f"{tensor}_{dim}" for tensor in "qkv" for dim in "sat")


def typed(kind: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, kind)


def every() -> Any:
    """Strides of a real launch are multiples of 16."""
    types = TABLES | typed("*bf16", "q", "kv", "k_rope", "k") | typed("i32", *FORWARD)
    yield compile_for_hopper(heads.heads_kernel, types, V3 | {"HEADS": heads.FORWARD}, frozenset((*FORWARD, "T")), 4)
    types = TABLES | typed("*bf16", "dq", "dk", "dv", "dx", "dkv", "dk_rope") | typed("i32", *BACKWARD)
    known = V3 | {"V2": 128, "HEADS": heads.BACKWARD}
    yield compile_for_hopper(heads.heads_backward_kernel, types, known, frozenset((*BACKWARD, "T")), 4)
    known = {"WEIGHTED": True, "BLOCK": gated.BLOCK}
    for dtype in ("*bf16", "*fp32"):
        types = typed(dtype, "h", "y", "dy", "dh") | typed("*fp32", "weights", "dweights") | {"F": "i32"}
        for kernel in (gated.gated_kernel, gated.gated_backward_kernel):
            yield compile_for_hopper(kernel, types, known, frozenset("F"), 8, fusion=True)
    types = (
        typed("*bf16", "dy", "x") | typed("*fp32", "inverse", "sums") | typed("i32", "N", "H", "dy_stride", "x_stride")
    )
    known = {"CHUNK": norm.CHUNK, "ROWS": norm.ROWS, "BLOCK": norm.BLOCK}
    yield compile_for_hopper(norm.norm_weight_kernel, types, known, frozenset(("N", "H", "dy_stride", "x_stride")), 4)
    layout = repr(gl.NVMMASharedLayout(128, 16, rank=2))
    types = {f"{name}_desc": f"tensordesc<bf16[64,{width}],{layout}>" for name, width in (("dy", 64), ("x", 256))}
    types |= {"total": "*fp32", "ends": "*i32"} | typed("i32", "M", "N", "tiles")
    known = {name.upper(): value for name, value in asdict(grouped.WGRAD).items()}
    yield compile_for_hopper(grouped.wgrad_kernel, types, known, frozenset("MN"), 4, fusion=True)
    types = {"logits": "*bf16", "targets": "*i64", "norms": "*fp32", "dloss": "*fp32", "N": "i32", "V": "i32"}
    for kernel in (loss.logsumexp_kernel, loss.logits_gradient_kernel):
        yield compile_for_hopper(kernel, types, {"BLOCK": loss.BLOCK}, frozenset("V"), 8, fusion=True)


if __name__ == "__main__":
    for made in every():
        print(json.dumps(made), flush=True)
