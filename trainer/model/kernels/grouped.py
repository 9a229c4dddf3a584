"""Weight gradients of routed experts on Hopper (sm_90), all in one kernel: total[x] += dy_xᵀ x_x, BF16 into FP32 sums.

An `addmm` for each expert costs the host a launch each, and where an expert has few rows or weights, leaves SMs idle.
Rows are not padded: an expert's last block of 64 runs into its neighbour's rows, which must count as zero. That block's
dy goes to the tensor cores through registers and is masked there, so shared memory is written by loads alone, and full
blocks pay nothing.

In Gluon, built as fp8/kernels/hopper.py: a CTA per SM walks over tiles of 128 x 256, one warp loads, and two warpgroups
own half of the tile's rows each. Both operands are contracted over rows, so both are read transposed in shared memory.
Sums in memory are read and written by TMA (tensors/sums.py), beside the products.
Legend: dy [R, M], x [R, N], rows grouped by expert; `ends` as in ExpertGroups.
"""

# The annotations of kernels are read at run time, so no `from __future__ import annotations` here.
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dryvine.comm.integers import ceil_div
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.persistent import barriers, place_of, programs
from dryvine.trainer.tensors.sums import RING, add_columns, addable, ask_first, make_ring, sums_descriptor


@dataclass(frozen=True)
class GroupedConfig:
    stages: int = 3  # blocks of 64 rows in flight
    group_m: int = 16  # tiles are walked in bands of this many rows of tiles, for L2
    registers: int = 240  # of a thread that multiplies


WGRAD = GroupedConfig()


@gluon.jit
def _tile(tile, ends, num_m, num_n, GROUP_M: gl.constexpr):
    """(expert, row and column of the tile, the expert's first row, the end of its rows)."""
    expert = tile // (num_m * num_n)
    tile_m, tile_n = place_of(tile % (num_m * num_n), num_m, num_n, GROUP_M)
    return expert, tile_m, tile_n, gl.load(ends + expert - 1, mask=expert > 0, other=0), gl.load(ends + expert)


@gluon.jit
def _loads(dy_desc, x_desc, dy_bufs, x_bufs, full, empty, ends, num_m, num_n, tiles, GROUP_M: gl.constexpr,
           STAGES: gl.constexpr):  # fmt: skip
    """The warp that loads: for each tile, each block of 64 rows of its expert, into the next stage."""
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, tile_m, tile_n, first, end = _tile(tile, ends, num_m, num_n, GROUP_M)
        for row in range(first, end, 64):
            # Wait until both warpgroups have left the stage. Its first use must not wait: the phase starts flipped.
            stage = turn % STAGES
            mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 64 * (128 + 256) * 2)
            # dy in two halves of 64 columns, one for each warpgroup; x for both.
            for i in gl.static_range(2):
                at = [row, tile_m * 128 + 64 * i]
                tma.async_copy_global_to_shared(dy_desc, at, bar, dy_bufs.index(stage * 2 + i))
            tma.async_copy_global_to_shared(x_desc, [row, tile_n * 256], bar, x_bufs.index(stage))
            turn += 1


@gluon.jit
def _sums(HALF: gl.constexpr, dy_bufs, x_bufs, full, empty, ring, ends, num_m, num_n, tiles, GROUP_M: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    """A warpgroup that multiplies: 64 of the 128 rows of each tile, number HALF of two."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(0, operand))
    turn, added = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, tile_m, tile_n, first, end = _tile(tile, ends, num_m, num_n, GROUP_M)
        place = (expert, tile_m * 128 + 64 * HALF, tile_n * 256)
        if first < end:
            ask_first(ring, HALF, place)
        full_end = end - (end - first) % 64
        sums = gl.zeros((64, 256), gl.float32, layout=mma)
        # Full blocks: both operands from shared memory.
        for row in range(first, full_end, 64):
            stage = turn % STAGES
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            dy = dy_bufs.index(stage * 2 + HALF).permute((1, 0))
            sums = warpgroup_mma(dy, x_bufs.index(stage), sums, use_acc=row > first, is_async=True)
            # This product stays in flight; the one before it is done with its stage.
            sums = warpgroup_mma_wait(1, deps=[sums])
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), pred=row > first)
            turn += 1
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), pred=full_end > first)
        # The last rows, fewer than 64.
        if full_end < end:
            stage = turn % STAGES
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            dy = dy_bufs.index(stage * 2 + HALF).permute((1, 0)).load(operand)
            # Zero times the neighbour's x. A NaN or an infinity there passes through; it makes the neighbour's own
            # gradient not finite anyway, and the step is skipped for that. Behind the last expert's rows x must be
            # finite: dispatched rows are zero there, and so is what SwiGLU makes of any row of weight zero.
            dy = gl.where(gl.expand_dims(full_end + rows < end, 0), dy, 0.0)
            sums = warpgroup_mma(dy, x_bufs.index(stage), sums, use_acc=full_end > first, is_async=True)
            sums = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(empty.index(stage))
            turn += 1
        if first < end:
            add_columns(ring, HALF, place, sums, added, 0, 8)
            added += 1
    # Shared memory must last until the last stores have read it.
    tma.store_wait(0)


@gluon.jit
def wgrad_kernel(dy_desc, x_desc, total_desc, ends, M, N, tiles, GROUP_M: gl.constexpr,
                 STAGES: gl.constexpr, REGISTERS: gl.constexpr, RING: gl.constexpr):  # fmt: skip
    dy_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, 64, 64], dy_desc.layout)
    x_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 256], x_desc.layout)
    ring = make_ring(total_desc, RING)
    full, empty = barriers(STAGES)
    num_m, num_n = gl.cdiv(M, 128), gl.cdiv(N, 256)
    # Two warpgroups multiply and one warp loads. The first warpgroup gets what registers the others leave.
    gl.warp_specialize(
        [
            (_sums, (0, dy_bufs, x_bufs, full, empty, ring, ends, num_m, num_n, tiles, GROUP_M, STAGES)),
            (_sums, (1, dy_bufs, x_bufs, full, empty, ring, ends, num_m, num_n, tiles, GROUP_M, STAGES)),
            (_loads, (dy_desc, x_desc, dy_bufs, x_bufs, full, empty, ends, num_m, num_n, tiles, GROUP_M, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def fits(dy_RM: Tensor, x_RN: Tensor, total_XMN: Tensor) -> bool:
    """Whether `wgrad` takes them: BF16 on Hopper, rows of whole 16 bytes (TMA's alignment)."""
    operands = (dy_RM, x_RN)
    return (
        addable(total_XMN)
        and torch.cuda.get_device_capability(x_RN.device)[0] == 9
        and all(t.dtype == torch.bfloat16 and t.shape[1] % 8 == 0 for t in operands)
    )


def wgrad(dy_RM: Tensor, x_RN: Tensor, groups: ExpertGroups, total_XMN: Tensor, config: GroupedConfig = WGRAD) -> None:
    """total[x] += dy_xᵀ x_x, FP32 [X, M, N], for operands that `fits` allows."""
    if not groups.rows:
        return
    _, m, n = total_XMN.shape
    tiles = len(groups.counts) * ceil_div(m, 128) * ceil_div(n, 256)
    wgrad_kernel[(programs(total_XMN.device, tiles),)](
        _descriptor(dy_RM, 64), _descriptor(x_RN, 256), sums_descriptor(total_XMN), groups.ends, m, n, tiles,
        GROUP_M=config.group_m, STAGES=config.stages, REGISTERS=config.registers, RING=RING, num_warps=4,
    )  # fmt: skip


def _descriptor(rows: Tensor, width: int) -> TensorDescriptor:
    """Gradients may come broadcast or transposed; those are copied."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(rows.contiguous(), [64, width], layout)
