"""DeepSeek's own kernels as an engine: github.com/deepseek-ai/DeepGEMM, whose wheel is built where it runs.

Written from the source of 2.8.0 (commit 0274ad7b): csrc/apis/gemm.hpp, csrc/utils/layout.hpp for what is asserted,
csrc/jit_kernels/impls/sm90_fp8_gemm_1d2d.hpp and _1d1d.hpp for what is not. Never run against the package: see
docs/fp8.md. The tests hold it against a stand-in that refuses what those files refuse.

Hopper has two kernels there. Of 1x128 by 128x128, to BF16, dense or with rows grouped in whole blocks of 128. Of 1x128
by 1x128, which adds to FP32. Weight gradients take the second, an expert at a time: the one for all experts at once
(k_grouped_fp8_gemm_nt_contiguous) gave other results each run through 2.6.1 (issue 365) and can hang or mix experts up
where a cluster straddles two (pull request 415, open); and it too wants each expert's operand copied out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dryvine.trainer.fp8.engines.operands import aligned, by_expert, by_range, imported, no_hopper
from dryvine.trainer.fp8.engines.protocol import Engine
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.tiles import TILE

INSTALL = "git clone --recursive https://github.com/deepseek-ai/DeepGEMM && cd DeepGEMM && ./install.sh"


@dataclass(frozen=True)
class DeepGemm(Engine):
    """K and N are multiples of 16 (TMA's alignment)."""

    @staticmethod
    def missing(device: torch.device) -> str | None:
        if reason := no_hopper(device):
            return reason
        instead = "fp8.gemm = 'triton' multiplies in the same recipe"
        try:
            deep_gemm = imported("deep_gemm")
        except ImportError:
            return f"is not installed: {INSTALL}; {instead}"
        except Exception as error:
            # It looks for nvcc when imported.
            return f"cannot be imported ({type(error).__name__}: {error}); {instead}"
        # It came with Hopper's kernel that adds to FP32.
        if not hasattr(deep_gemm, "k_grouped_fp8_gemm_nt_contiguous"):
            return f"is {getattr(deep_gemm, '__version__', 'old')}, without weight gradients on Hopper: {INSTALL}"
        return None

    def product(
        self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        if dtype != torch.bfloat16:
            return _fp32(a, b, groups).to(dtype)
        if groups is not None:
            return _grouped(a, b, groups)
        import deep_gemm

        y = a.values.new_empty(len(a.values), len(b.values), dtype=dtype)
        deep_gemm.fp8_gemm_nt((a.values, aligned(a.scales)), (b.values, _packed(b.scales)), y)
        return y

    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        for expert, part_a, part_b in by_range(a, b, groups):
            _add(part_a, part_b, total[expert])


def _grouped(a: Quantized, b: Quantized, groups: ExpertGroups) -> Tensor:
    """A block of 128 rows must be of one expert, so rows are moved apart before and together after. Blocks are filled
    up with their expert's last row; those results are dropped."""
    import deep_gemm

    n = b.values.shape[-2]
    if not groups.blocks:
        return a.values.new_empty(0, n, dtype=torch.bfloat16)
    # Of each block, which rows to take: the expert's next 128, and at its end the last one again.
    table = groups.tables.blocks
    rows = torch.minimum(table[:, 1:2] + torch.arange(TILE, dtype=torch.int32, device=table.device), table[:, 2:] - 1)
    rows = rows.flatten()
    values = a.values.view(torch.uint8).index_select(0, rows).view(a.values.dtype)
    scales = a.scales.t().index_select(1, rows).t()
    experts = table[:, 0].repeat_interleave(TILE)
    y = a.values.new_empty(len(rows), n, dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous((values, scales), (b.values, _packed(b.scales)), y, experts)
    # Each expert's results begin at its first block.
    starts = (TILE * start for start in groups.block_starts)
    return torch.cat([y[start : start + count] for start, count in zip(starts, groups.counts, strict=False)])


def _fp32(a: Quantized, b: Quantized, groups: ExpertGroups | None) -> Tensor:
    """The kernel that adds to FP32 wants B in 1x128 tiles too: a block's scale is repeated for its rows."""
    n = b.values.shape[-2]
    b_rows = Quantized(b.values, b.scales.repeat_interleave(TILE, -2)[..., :n, :])
    y = torch.zeros(len(a.values), n, device=a.values.device)
    if groups is None:
        _add(a, b_rows, y)
    else:
        for rows, part_a, part_b in by_expert(a, b_rows, groups):
            _add(part_a, part_b, y[rows])
    return y


def _add(a: Quantized, b: Quantized, total: Tensor) -> None:
    """total += A Bᵀ, both in 1x128 tiles. K is tokens and differs from call to call, so it is not compiled in."""
    import deep_gemm

    # It takes rows to be K apart, unchecked.
    operands = [(q.values.contiguous(), aligned(q.scales)) for q in (a, b)]
    deep_gemm.fp8_gemm_nt(*operands, total, c=total, recipe=(1, 1, TILE), compiled_dims="mn")


def _packed(scales: Tensor) -> Tensor:
    """Scales of 128x128 blocks without the room at the ends of rows. `contiguous` would leave a single row as it is."""
    return scales.clone(memory_format=torch.contiguous_format)
