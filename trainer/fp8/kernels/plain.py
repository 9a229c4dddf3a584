"""FP8 GEMMs in plain Triton, y = A Bᵀ with scales, promoted every 128 of K: for GPUs other than Hopper.

The same contract as hopper.py in the language that Triton's CPU interpreter runs, so that its tests need no GPU. On
Hopper the warps that wait for `tl.dot` are those that add its result, and the tensor cores idle meanwhile; there
hopper.py is taken. Legend as in hopper.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dryvine.trainer.fp8.kernels.numbers import block_rows
from dryvine.trainer.fp8.tensors import TILE, Groups, Quantized, blocks


@dataclass(frozen=True)
class Config:
    stages: int = 4
    warps: int = 8
    group_m: int = 8


PLAIN = Config()


@triton.jit
def where(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of a tile, in bands of GROUP_M rows."""
    width = GROUP_M * num_n
    first = (tile // width) * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    return first + (tile % width) % height, (tile % width) // height


@triton.jit
def product_kernel(a_desc, b_desc, c, sa, sb, table, M, N, K, num_m, sa_stride, sb_expert, sb_row, c_stride,
                   GROUPED: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    tile_m, tile_n = where(tl.program_id(0), num_m, tl.cdiv(N, 128), GROUP_M)
    first, end = block_rows(tile_m, table, M, GROUPED)
    expert = tl.load(table + 3 * tile_m) if GROUPED else 0
    i = tl.arange(0, 128)
    m = first + i
    n = tile_n * 128 + i
    total = tl.zeros((128, 128), tl.float32)
    for k in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
        a = a_desc.load([first, k * 128])
        b = b_desc.load([expert * N + tile_n * 128, k * 128])
        a_scale = tl.load(sa + k * sa_stride + m, mask=m < end, other=0.0)
        b_scale = tl.load(sb + expert * sb_expert + tile_n * sb_row + k)
        total += tl.dot(a, b.T) * (a_scale * b_scale)[:, None]
    at = c + m.to(tl.int64)[:, None] * c_stride + n[None, :]
    tl.store(at, total.to(c.dtype.element_ty), mask=(m < end)[:, None] & (n < N)[None, :])


@triton.jit
def wgrad_kernel(a_desc, b_desc, c, sa, sb, starts, M, N, num_m, sa_stride, sb_stride, GROUP_M: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    expert = tl.program_id(1)
    tile_m, tile_n = where(tl.program_id(0), num_m, tl.cdiv(N, 128), GROUP_M)
    i = tl.arange(0, 128)
    m = tile_m * 128 + i
    n = tile_n * 128 + i
    first = tl.load(starts + expert)
    last = tl.load(starts + expert + 1)
    total = tl.zeros((128, 128), tl.float32)
    for k in tl.range(first, last, num_stages=STAGES):
        a = a_desc.load([tile_m * 128, k * 128])
        b = b_desc.load([tile_n * 128, k * 128])
        a_scale = tl.load(sa + k * sa_stride + m, mask=m < M, other=0.0)
        b_scale = tl.load(sb + k * sb_stride + n, mask=n < N, other=0.0)
        total += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
    at = c + expert.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    keep = (m < M)[:, None] & (n < N)[None, :] & (first < last)
    tl.store(at, tl.load(at, mask=keep, other=0.0) + total, mask=keep)


def descriptor(values: Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(values.flatten(0, -2), [TILE, TILE])


def product(
    a: Quantized,
    b: Quantized,
    groups: Groups | None = None,
    dtype: torch.dtype = torch.bfloat16,
    config: Config = PLAIN,
) -> Tensor:
    """As hopper.product."""
    (m, k), n = a.values.shape, b.values.shape[-2]
    c = torch.empty(m, n, dtype=dtype, device=a.values.device)
    num_m = blocks(m) if groups is None else groups.blocks
    if num_m:
        product_kernel[(num_m * blocks(n),)](
            descriptor(a.values), descriptor(b.values), c, a.scales, b.scales,
            c if groups is None else groups.tables[0], m, n, k, num_m, a.scales.stride(1),
            b.scales.stride(0) if groups else 0, b.scales.stride(-2), c.stride(0), groups is not None, config.group_m,
            config.stages, num_warps=config.warps,
        )  # fmt: skip
    return c


def wgrad(a: Quantized, b: Quantized, groups: Groups, total: Tensor, config: Config = PLAIN) -> None:
    """As hopper.wgrad."""
    m, n = a.values.shape[0], b.values.shape[0]
    if groups.blocks:
        wgrad_kernel[(blocks(m) * blocks(n), len(groups.counts))](
            descriptor(a.values), descriptor(b.values), total, a.scales, b.scales, groups.tables[1], m, n, blocks(m),
            a.scales.stride(1), b.scales.stride(1), config.group_m, config.stages, num_warps=config.warps,
        )  # fmt: skip
