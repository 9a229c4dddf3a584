"""NVIDIA's Transformer Engine as an engine: cuBLASLt, like `torch`, but grouped, and adding to FP32 in place.

Written from the source of 2.20.2: transformer_engine/pytorch/cpp_extensions/gemm.py,
transformer_engine/pytorch/tensor/float8_blockwise_tensor.py and its storage for the layout,
transformer_engine/common/gemm/cublaslt_gemm.cu for what is refused. Run against that package on an H100 (docs/fp8.md);
on a CPU tests hold it against a stand-in that refuses what those files refuse.

Its blockwise tensors "in GEMM format" are what Quantized holds: values by rows, scales of 1x128 tiles as [K / 128, rows
rounded up to 4], of 128x128 blocks as [rows / 128, K / 128 rounded up to 4]. So nothing is cast and whole tensors are
not copied. Wgrad's operands are transposed already and go in by rows too, instead of as its column-wise copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from dryvine.comm.extras import install
from dryvine.comm.integers import round_up
from dryvine.trainer.fp8.engines.operands import aligned, by_expert, by_range, filled, imported, no_hopper
from dryvine.trainer.fp8.engines.protocol import Engine
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized

# Before, its tensors were built with other arguments.
LEAST = (2, 20)
FIX = f"{install('transformer_engine')} --no-build-isolation; fp8.gemm = 'torch' is cuBLASLt too"


@dataclass(frozen=True)
class TransformerEngine(Engine):
    """K is a multiple of 16, N of 8."""

    @staticmethod
    def missing(device: torch.device) -> str | None:
        if reason := no_hopper(device):
            return reason
        try:
            installed = version("transformer_engine")
        except PackageNotFoundError:
            return f"is not installed: {FIX}"
        if tuple(map(int, installed.split(".")[:2])) < LEAST:
            return f"is {installed}, and needs to be 2.20 or later: {FIX}"
        # It loads CUDA's libraries when imported, which can fail in many ways.
        try:
            imported("transformer_engine.pytorch")
        except Exception as error:
            return f"cannot be imported ({type(error).__name__}: {error}): {FIX}"
        return None

    def product(
        self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        if groups is not None:
            return _grouped(a, b, groups, dtype)
        whole = filled(a, 8)
        y = a.values.new_empty(len(whole.values), len(b.values), dtype=dtype)
        general_gemm(_tensor(b), _tensor(whole), dtype, layout="TN", out=y)
        return y[: len(a.values)]

    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        parts = list(by_range(a, b, groups))
        _multiply(
            [_tensor(part) for _, _, part in parts],
            [_tensor(part) for _, part, _ in parts],
            [total[expert] for expert, _, _ in parts],
            accumulate=True,
        )


def _grouped(a: Quantized, b: Quantized, groups: ExpertGroups, dtype: torch.dtype) -> Tensor:
    """Each expert's rows are filled up to a multiple of 8."""
    n = b.values.shape[-2]
    parts = [(rows, filled(part_a, 8), part_b) for rows, part_a, part_b in by_expert(a, b, groups)]
    out = [a.values.new_empty(len(part.values), n, dtype=dtype) for _, part, _ in parts]
    _multiply([_tensor(part) for _, _, part in parts], [_tensor(part) for _, part, _ in parts], out)
    y = a.values.new_empty(len(a.values), n, dtype=dtype)
    for (rows, _, _), part in zip(parts, out, strict=True):
        y[rows] = part[: rows.stop - rows.start]
    return y


def _multiply(b: Sequence[object], a: Sequence[object], out: list[Tensor], accumulate: bool = False) -> None:
    """out[i] (+)= A_i B_iᵀ. The library's first operand is our right one: cuBLAS stores matrices by columns."""
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    if not out:
        return
    general_grouped_gemm(
        b, a, out, [None] * len(out), out[0].dtype, layout="TN", m_splits=[len(part) for part in out],
        accumulate=accumulate, use_split_accumulator=True,
    )  # fmt: skip


def _tensor(q: Quantized) -> object:
    """As Transformer Engine holds it: bytes and scales by rows (a multiple of 4), no copy by columns, no quantiser."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor import Float8BlockwiseQTensorStorage

    blocks = q.tile[0] > 1
    values = q.values.contiguous().view(torch.uint8)
    scales = _rows_with_padding(q.scales) if blocks else aligned(q.scales).t()
    return Float8BlockwiseQTensorStorage(values, scales, None, None, tex.DType.kFloat8E4M3, None, blocks)


def _rows_with_padding(scales: Tensor) -> Tensor:
    """Scales of blocks with the room that `empty_blocks` left at the ends of rows."""
    rows, cols = scales.shape
    return scales.as_strided((rows, round_up(cols, 4)), (round_up(cols, 4), 1))
