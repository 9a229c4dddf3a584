"""FP8 matrix products, y = A Bᵀ and the wgrad accumulation, by several engines behind one protocol.

`emulate` is the truth: the arithmetic of the recipe in plain torch, on any machine, with an accumulator one can choose.
The others are the same two functions on a GPU; those of other packages are in gemm_deep_gemm.py and gemm_te.py. An
engine is a class with `missing` (why it cannot run here, in words) and a line in ENGINES of choose.py, which picks one.

Legend: A [M, K] in 1x128 tiles; B [N, K], or [X, N, K] by expert, in 128x128 blocks; P padded rows (see ExpertGroups).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.comm.integers import round_up
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.tiles import TILE

Accumulator = Literal["fp32", "hopper"]


class Products(Protocol):
    """What multiplies."""

    def product(
        self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """[M, K] x [N, K] -> [M, N]; with groups, each expert's rows of A by its own B [X, N, K]. Fprop and Dgrad."""
        ...

    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        """total[x] += A_x B_xᵀ over each expert's padded rows: [M, P] x [N, P] -> FP32 [X, M, N]."""
        ...


class Engine(Products, Protocol):
    """Products by one means, which a machine may lack."""

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Why this engine cannot work on `device`, and what would mend it; None if it can."""
        ...


def by_expert(a: Quantized, b: Quantized, groups: ExpertGroups) -> Iterator[tuple[slice, Quantized, Quantized]]:
    """The rows of each expert that has any, with its operands."""
    first = 0
    for expert, count in enumerate(groups.counts):
        rows = slice(first, first + count)
        first += count
        if count:
            yield (
                rows,
                Quantized(a.values[rows], a.scales[rows] if a.tile[0] == 1 else a.scales, a.tile),
                Quantized(b.values[expert], b.scales[expert], b.tile),
            )


def by_range(a: Quantized, b: Quantized, groups: ExpertGroups) -> Iterator[tuple[int, Quantized, Quantized]]:
    """Operands of wgrad over the padded rows of each expert that has any."""

    def cut(q: Quantized, first: int, last: int) -> Quantized:
        return Quantized(q.values[:, first * TILE : last * TILE], q.scales[:, first:last], q.tile)

    starts = groups.block_starts
    for expert, (first, last) in enumerate(pairwise(starts)):
        if last > first:
            yield expert, cut(a, first, last), cut(b, first, last)


@dataclass(frozen=True)
class Emulate:
    """`accumulator="fp32"` sums in FP32 all through, which makes the whole product one matmul of the values read back:
    the partial sums per 128 of K differ from it by the order of FP32 additions only.

    "hopper" models the tensor cores instead: the running sum is cut (toward zero) to 14 bits after each instruction's
    32 products, and moved to an FP32 sum every `promotion` of K (0: never). The alignment of the 32 products to the
    largest, which loses a little more, is not modelled.
    """

    accumulator: Accumulator = "fp32"
    promotion: int = TILE

    @staticmethod
    def missing(device: torch.device) -> str | None:
        return None

    def product(
        self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        if groups is None:
            return self._sum(a, b).to(dtype)
        y = torch.empty(len(a.values), b.values.shape[-2], dtype=dtype, device=a.values.device)
        for rows, part_a, part_b in by_expert(a, b, groups):
            y[rows] = self._sum(part_a, part_b).to(dtype)
        return y

    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        for expert, part_a, part_b in by_range(a, b, groups):
            total[expert] += self._sum(part_a, part_b)

    def _sum(self, a: Quantized, b: Quantized) -> Tensor:
        if self.accumulator == "fp32":
            return a.dequantize() @ b.dequantize().t()
        k = a.values.shape[1]
        step = self.promotion or round_up(k, TILE)
        if not self.promotion:  # scales must leave the sum before it: they are folded into the operands
            return _hopper(a.dequantize(), b.dequantize())
        total = torch.zeros(len(a.values), len(b.values), device=a.values.device)
        for first in range(0, k, step):
            total += _hopper(_slice(a, first, step), _slice(b, first, step))
        return total


def _slice(q: Quantized, first: int, step: int) -> Tensor:
    return q.dequantize()[:, first : first + step]


def _hopper(a: Tensor, b: Tensor) -> Tensor:
    """A Bᵀ with an accumulator of 14 significant bits, in instructions of 32."""
    total = torch.zeros(len(a), len(b), device=a.device)
    for first in range(0, a.shape[1], 32):
        total.addmm_(a[:, first : first + 32], b[:, first : first + 32].t())
        total.view(torch.int32).bitwise_and_(~0x3FF)  # 1 + 13 of FP32's 1 + 23 bits
    return total


def no_hopper(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs a Hopper GPU, and the device is {device.type}; fp8.gemm = 'emulate' works anywhere"
    major = torch.cuda.get_device_capability(device)[0]
    return None if major == 9 else f"needs compute capability 9.x (H100, H200), and this GPU has {major}.x"


@dataclass(frozen=True)
class Triton:
    """Own kernels (kernels/hopper.py): dense, grouped, and grouped wgrad that adds in place."""

    @staticmethod
    def missing(device: torch.device) -> str | None:
        return no_hopper(device) or (None if find_spec("triton") else "needs triton >= 3.6: pip install triton")

    def product(
        self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        from dryvine.trainer.fp8.kernels import hopper

        return hopper.product(a, b, groups, dtype)

    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        from dryvine.trainer.fp8.kernels import hopper

        hopper.wgrad(a, b, groups, total)


@dataclass(frozen=True)
class Torch:
    """cuBLASLt through torch.nn.functional.scaled_mm. It knows no groups here, so experts are multiplied in turn."""

    @staticmethod
    def missing(device: torch.device) -> str | None:
        if reason := no_hopper(device):
            return reason
        version = torch.version.cuda or "0.0"
        old = tuple(map(int, version.split("."))) < (12, 9)
        return f"needs CUDA 12.9 or later for block scales; this torch has {version}" if old else None

    def product(
        self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        if groups is None:
            return _scaled_mm(a, b, dtype)
        y = torch.empty(len(a.values), b.values.shape[-2], dtype=dtype, device=a.values.device)
        for rows, part_a, part_b in by_expert(a, b, groups):
            y[rows] = _scaled_mm(part_a, part_b, dtype)
        return y

    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        for expert, part_a, part_b in by_range(a, b, groups):
            total[expert] += _scaled_mm(part_a, part_b, torch.float32)


def _scaled_mm(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """K-slices are copied, since scaled_mm wants whole rows, and a multiple of 4 of them."""
    kinds = {(1, TILE): functional.ScalingType.BlockWise1x128, (TILE, TILE): functional.ScalingType.BlockWise128x128}
    whole = filled(a, 4)
    y = functional.scaled_mm(
        whole.values.contiguous(),
        b.values.contiguous().t(),
        token_major(whole.scales),
        kinds[a.tile],
        token_major(b.scales) if b.tile[0] == 1 else _padded_turned(b.scales),
        kinds[b.tile],
        output_dtype=dtype,
    )
    return y[: len(a.values)]


def token_major(scales: Tensor) -> Tensor:
    """[R, B] with strides (1, R) exactly, where B is 1 too: `contiguous` leaves the stride of a single column alone."""
    if scales.stride() == (1, len(scales)):
        return scales
    return torch.empty_strided(scales.shape, (1, len(scales)), device=scales.device).copy_(scales)


def filled(q: Quantized, multiple: int) -> Quantized:
    """Rows of 1x128 tiles filled up with zeros to a multiple; itself where they are one."""
    extra = -len(q.values) % multiple
    if not extra:
        return q
    zeros = q.values.new_zeros(extra, q.values.shape[1])
    return Quantized(
        torch.cat((q.values, zeros)), torch.cat((q.scales, q.scales.new_ones(extra, q.scales.shape[1]))), q.tile
    )


def aligned(scales: Tensor) -> Tensor:
    """[R, B] with strides (1, R rounded up to 4), where TMA can read. (A slice may have the one without the other.)"""
    rows, wide = len(scales), round_up(len(scales), 4)
    if scales.stride() == (1, wide) and scales.data_ptr() % 16 == 0:
        return scales
    return scales.new_empty(scales.shape[1], wide).t()[:rows].copy_(scales)


def _padded_turned(scales: Tensor) -> Tensor:
    """Scales of blocks [N / 128, K / 128] as [K / 128 rounded up to 4, N / 128]: those of K side by side in memory, and
    what `empty_blocks` left room for included."""
    width = scales.stride(0)
    return scales.as_strided((width, len(scales)), (1, width), scales.storage_offset())
