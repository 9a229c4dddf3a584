"""Kernels compiled for sm_90 without a GPU. For processes with TRITON_INTERPRET unset."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from dryvine.trainer.tensors.sums import CHUNK

TOOL = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def compile_for_hopper(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: frozenset[str],
    warps: int,
    maxnreg: int | None = None,
    fusion: bool = False,
) -> dict[str, Any]:
    """`types` of the arguments that are not constants. Pointers, and `aligned` sizes, are multiples of 16."""
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    sure = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned or signature[n][0] == "*"}
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    built = triton.compile(
        source(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, sure),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": fusion, "maxnreg": maxnreg},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([TOOL, "-res-usage", cubin.name], capture_output=True, text=True, check=True)
    usage_of = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr))
    ptx = built.asm["ptx"]
    return {
        "kernel": f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}",
        "constants": dict(constants),
        "triton": triton.__version__,
        "warps": warps,
        "registers": int(usage_of["REG"]),
        "stack": int(usage_of["STACK"]),
        "shared": built.metadata.shared,
        "wgmma": Counter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64\S+)", ptx)),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "cast": ptx.count("cvt.rn.satfinite.e4m3x2.f32"),
        "widest": [_widest(ptx, way) for way in ("ld", "st")],
    }


def sums_type() -> str:
    """Of the descriptor of FP32 sums."""
    return f"tensordesc<fp32[1,64,{CHUNK}],{gl.NVMMASharedLayout(128, 32, rank=3)!r}>"


def _widest(ptx: str, way: str) -> list[int]:
    """Bytes a thread moves with each of its global loads or stores."""
    widths = re.findall(rf"{way}\.global\S*?(?:\.v(\d))?\.[bfu](\d+)", ptx)
    moved = [int(count or 1) * int(bits) // 8 for count, bits in widths]
    if way == "ld":  # some go to shared memory
        moved += [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global .*?(0x\w+)", ptx)]
    return sorted(moved, reverse=True)
