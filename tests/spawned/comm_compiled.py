"""Compiles comm's kernels for sm_90 without a GPU and prints what came out, one JSON line each. Run by
test_comm_kernels.py: the kernels must be defined with TRITON_INTERPRET unset, which is another process."""

from __future__ import annotations

import json
from typing import Any

from dryvine.comm.dispatch import kernels, plan_kernels
from tests.support.compile import compile_for_hopper

POINTERS = {
    *("rows", "own", "out", "index", "source", "begin", "expert", "message", "pair", "token", "place", "order", "back"),
    *("row", "total", "owner"),
}
PLAIN = {"BESIDE": False}


def compile_one(kernel: Any, constants: dict[str, Any], warps: int, **types: str) -> dict[str, Any]:
    """Of sizes nothing is known, as at a launch with odd ones: what is wide here is wide always."""
    known = dict.fromkeys(POINTERS, "*i64") | {"tallies": "*i32"} | types
    kinds = {name: known.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return compile_for_hopper(kernel, kinds, constants, frozenset(), warps)


def every() -> Any:
    yield from moved()
    yield compile_one(kernels.tally_kernel, {"K": 8, "BLOCK": kernels.BLOCK}, 8)
    yield compile_one(kernels.scan_kernel, {"CHUNK": 1024}, 4)
    yield compile_one(kernels.place_kernel, {"BLOCK": kernels.BLOCK, "PART": kernels.PART}, 8)
    for ranks, share in ((1, 256), (64, 4), (8, 32)):
        yield compile_one(kernels.arrive_kernel, {"WIDE": ranks, "HIGH": share, "BLOCK": 256}, 4)
    yield from planned()
    yield from small()


def moved() -> Any:
    """Rows of every width, from one element on: Triton's layouts, and its mistakes in them, go by a tile's shape."""
    for cols in (2**i for i in range(kernels.TILE.bit_length())):
        shape = {"ROWS": kernels.TILE // cols, "COLS": cols}
        most = {"MOST": 8 if cols in (8, kernels.TILE) else 2}
        for kind, vec in (("*bf16", min(cols, 8)), ("*fp32", min(cols, 4))):
            for way in ({"BESIDE": False, "EVEN": False}, {"BESIDE": True, "EVEN": True}):
                constants = {"VEC": vec, **most, **shape, **way}
                yield compile_one(kernels.sum_kernel, constants, 4, rows=kind, out=kind, own=kind)
        for beside in (False, True):
            yield compile_one(kernels.gather_kernel, {"VEC": min(cols, 2), **shape, "BESIDE": beside}, 4)
    column = {"VEC": 1, "ROWS": kernels.TILE, "COLS": 1, **PLAIN}
    yield compile_one(kernels.gather_kernel, column, 4, rows="*i32", own="*i32", out="*i32")


def planned() -> Any:
    """Experts and choices of a few and of many."""
    of_chosen = dict.fromkeys(("chosen", "own", "tallies"), "*i32")
    for most in ({"K": 8}, {"K": 1, "W": 1, "X": 1, "alignment": 1}, {"K": 8, "alignment": 1, "B": 1, "Q": 1}):
        block = {"BLOCK": plan_kernels.BLOCK, "PART": plan_kernels.PART}
        tallied = {name: value for name, value in most.items() if name in plan_kernels.tally_kernel.arg_names}
        yield compile_one(plan_kernels.tally_kernel, tallied | block, 8, **of_chosen)
        yield compile_one(plan_kernels.place_kernel, most | block | {"CHUNK": plan_kernels.CHUNK}, 8, **of_chosen)


def small() -> Any:
    """Arguments that are 1 become constants at a launch, which the interpreter does not do."""
    one = dict.fromkeys(("width", "row_stride", "out_stride", "own_stride"), 1)
    column = {"VEC": 1, "ROWS": kernels.TILE, "COLS": 1}
    for beside in (False, True):
        constants = column | one | {"BESIDE": beside}
        yield compile_one(kernels.gather_kernel, constants, 4, rows="*i32", own="*i32", out="*i32")
        constants |= {"MOST": 1, "EVEN": beside}
        yield compile_one(kernels.sum_kernel, constants, 4, rows="*bf16", own="*bf16", out="*bf16")
    order = dict.fromkeys(("P", "B", "E", "X"), 1)
    yield compile_one(kernels.tally_kernel, {"P": 1, "B": 1, "E": 1, "K": 1, "BLOCK": kernels.BLOCK}, 8)
    yield compile_one(kernels.scan_kernel, {"B": 1, "E": 1, "X": 1, "CHUNK": 1024}, 4)
    yield compile_one(kernels.place_kernel, order | {"K": 1, "BLOCK": kernels.BLOCK, "PART": kernels.PART}, 8)
    for ranks, share in ((1, 1), (256, 1)):
        known = {"W": 1} if ranks == 1 else {}
        yield compile_one(
            kernels.arrive_kernel, known | {"X": 1, "alignment": 1, "WIDE": ranks, "HIGH": share, "BLOCK": 256}, 4
        )


if __name__ == "__main__":
    for made in every():
        print(json.dumps(made), flush=True)
