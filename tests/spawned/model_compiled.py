"""Compiles the model's own kernels for sm_90 without a GPU, at V3's sizes, and prints what came out as JSON lines.
Run by test_model_kernels.py: the kernels must be defined with TRITON_INTERPRET unset, which is another process."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from dryvine.trainer import adam_kernel
from dryvine.trainer.model.kernels import gate, grouped, loss, norm, qkv, swiglu
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.tensors import sums
from tests.support.compile import compile_for_hopper, sums_type

V3 = {"A": 128, "NOPE": 128, "PAIRS": 32, "V": 128, "NOPE2": 128, "PAIRS2": 32}
TABLES = {"cos": "*fp32", "sin": "*fp32", "T": "i32"}
FORWARD = ("q_stride", "kv_stride", "k_rope_stride")
BACKWARD = tuple(f"{tensor}_{dim}" for tensor in "qkv" for dim in "sat")
V3_GATE = {"routed": 256, "top_k": 8, "groups": 8, "group_limit": 4, "score": "sigmoid", "normalise": True}
V2_GATE = {"routed": 160, "top_k": 6, "groups": 8, "group_limit": 3, "score": "softmax", "normalise": True}
GATES: tuple[dict[str, Any], ...] = (
    V3_GATE,
    V3_GATE | {"balance_alpha": 0},
    V2_GATE | {"balance_alpha": 0},
    {"routed": 64, "top_k": 6, "score": "softmax", "normalise": False},
    {"routed": 6, "top_k": 3, "groups": 2, "score": "sigmoid", "normalise": True},
    {"routed": 1, "top_k": 1, "score": "sigmoid", "normalise": False},
    {"routed": 1100, "top_k": 2, "score": "softmax", "normalise": True},
)  # layouts, and mistakes in them, go by a tile's shape
WIDE = 20_480  # of a norm: wider than that of any published model
REALS = ("logits", "bias", "weights", "chosen", "terms", "dweights", "dloss", "dlogits")


def typed(kind: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, kind)


def every() -> Any:
    """Strides of a real launch are multiples of 16."""
    types = TABLES | typed("*bf16", "q", "kv", "k_rope", "k") | typed("i32", *FORWARD)
    yield compile_for_hopper(qkv.heads_kernel, types, V3 | {"HEADS": qkv.FORWARD}, frozenset((*FORWARD, "T")), 4)
    types = TABLES | typed("*bf16", "dq", "dk", "dv", "dx", "dkv", "dk_rope") | typed("i32", *BACKWARD)
    known = V3 | {"V2": 128, "HEADS": qkv.BACKWARD}
    yield compile_for_hopper(qkv.heads_backward_kernel, types, known, frozenset((*BACKWARD, "T")), 4)
    known = {"WEIGHTED": True, "BLOCK": swiglu.BLOCK}
    for dtype in ("*bf16", "*fp32"):
        types = typed(dtype, "h", "y", "dy", "dh") | typed("*fp32", "weights", "dweights") | {"F": "i32"}
        for kernel in (swiglu.gated_kernel, swiglu.gated_backward_kernel):
            yield compile_for_hopper(kernel, types, known, frozenset("F"), 8, fusion=True)
    yield from norms()
    layout = repr(gl.NVMMASharedLayout(128, 16, rank=2))
    types = {f"{name}_desc": f"tensordesc<bf16[64,{width}],{layout}>" for name, width in (("dy", 64), ("x", 256))}
    types |= {"total_desc": sums_type(), "ends": "*i32"} | typed("i32", "M", "N", "tiles")
    known = {name.upper(): value for name, value in asdict(grouped.WGRAD).items()} | {"RING": sums.RING}
    yield compile_for_hopper(grouped.wgrad_kernel, types, known, frozenset("MN"), 4, fusion=True)
    types = {"logits": "*bf16", "targets": "*i64", "norms": "*fp32", "scales": "*fp32", "V": "i32"}
    for kernel in (loss.logsumexp_kernel, loss.logits_gradient_kernel):
        yield compile_for_hopper(kernel, types, {"BLOCK": loss.BLOCK}, frozenset("V"), 8, fusion=True)
    numbers = ("factor", "keep", "rate", "eps", "beta1", "rest1", "beta2", "rest2", "log1", "log2")
    for moments in ("*fp32", "*bf16"):
        types = (
            typed("*fp32", "master", "grad", "updates") | typed(moments, "first", "second") | typed("fp32", *numbers)
        )
        types |= {"weights": "*bf16", "N": "i32", "matrices": "i32"}
        known = {"WEIGHTS": True, "BLOCK": adam_kernel.BLOCK}
        yield compile_for_hopper(adam_kernel.adamw_kernel, types, known, frozenset(("N", "matrices")), 4, fusion=True)
    for facts in GATES:
        yield from gates(Shape.model_construct(**facts))


def norms() -> Any:
    """As launched, at V3's widths and a very wide one."""
    strides = ("H", "dy_stride", "x_stride", "residual_stride")
    types = typed("*fp32", "inverse", "sums") | typed("i32", "N", "rows", *strides)
    for dtype in (torch.bfloat16, torch.float32):
        kind = "*bf16" if dtype == torch.bfloat16 else "*fp32"
        reals = typed(kind, "dy", "x", "weight", "residual", "dx")
        for width, residual in ((WIDE, True), (7168, True), (7168, False), (1536, False), (512, False)):
            known, warps = norm.tile(width, dtype)
            yield compile_for_hopper(
                norm.norm_backward_kernel,
                types | reals,
                known if residual else known | {"residual": None},
                frozenset(strides),
                warps,
                fusion=True,
            )


def gates(shape: Shape) -> Any:
    """As launched: what a kernel has no use for is None. Once also of sequences of one token, a constant to Triton."""
    balanced, chosen = shape.balance_alpha > 0, shape.sparse_gate
    types = typed("*fp32", *REALS) | typed("fp32", "scale", "share")
    types |= {"experts": "*i64", "load": "*i64", "tallies": "*i32", "T": "i32"}
    known = gate.tile(shape) | gate.weighing(shape) | {"BALANCED": balanced} | ({"T": 1} if shape.routed == 1 else {})
    missing: dict[str, Any] = {} if chosen else {"chosen": None}
    more = {"KEEP": chosen, "COUNT": True, "BEST": shape.ranked_by, "LIMIT": shape.group_limit}
    missing |= {} if balanced else {"tallies": None}
    yield one(gate.gate_kernel, types, known | more | missing)
    missing |= {} if balanced else {"dloss": None}
    missing |= {"logits": None} if chosen else {}
    yield one(gate.gate_backward_kernel, types, known | {"KEPT": chosen, "WEIGHED": True} | missing)
    if balanced:
        yield one(gate.balance_kernel, types, known)


def one(kernel: Any, types: dict[str, str], known: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in known.items() if name in kernel.arg_names}
    return compile_for_hopper(kernel, types, known, frozenset(), 1, fusion=True)


if __name__ == "__main__":
    for made in every():
        print(json.dumps(made), flush=True)
