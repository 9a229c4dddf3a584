"""FP8 GEMMs for Hopper (sm_90) in Gluon, Triton's explicit dialect: y = A Bᵀ with scales, promoted every 128 of K.

Why not plain `tl.dot`: the tensor cores' accumulator keeps about 14 bits, so each 128 of K must be added to an FP32
accumulator by the CUDA cores (arXiv 2412.19437, 3.3.2). `tl.dot` makes a warp wait for its product and then add, with
the tensor cores idle meanwhile, and synchronises all warps once an iteration. Here one warp does nothing but TMA loads
and two warpgroups each own half of the tile's rows: while one adds, the other's products run. Persistent: a CTA per SM
walks over tiles, and loads of the next tile start before this one is stored.

Legend: A [M, K] in 1x128 tiles, B [N, K] in 128x128 (`product`) or 1x128 (`wgrad`) tiles, `table` as in ExpertGroups.
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
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.sums import RING, add_columns, addable, ask_first, make_ring, sums_descriptor
from dryvine.trainer.tensors.tiles import TILE, blocks


@dataclass(frozen=True)
class TileConfig:
    """Tile of 128 x (sub * count): `count` products of width `sub` share an A tile and registers of partial sums."""

    sub: int = 128
    count: int = 2
    stages: int = 4
    # Tiles are walked in bands of this many rows of tiles, for L2.
    group_m: int = 8
    registers: int = 232


PRODUCT = TileConfig()
# A stage less than products have: its shared memory is the ring's of the sums.
WGRAD = TileConfig(group_m=16, registers=240, stages=3)


@gluon.jit
def _rows(tile_m, table, M, GROUPED: gl.constexpr):
    """(expert, first row, end of the expert's rows) of a row of tiles; `table` as in ExpertGroups."""
    if GROUPED:
        entry = table + 3 * tile_m
        return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2)
    else:
        return 0, tile_m * 128, M


@gluon.jit
def _fill(turn, a_desc, b_desc, a_bufs, b_bufs, full, empty, m0, n0, k0, SUB: gl.constexpr, COUNT: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    """Start the loads of one 128 of K into the next stage, once both warpgroups are done with it."""
    stage = turn % STAGES
    # A barrier's phase flips each time it completes: its bit is the parity of the rounds through all stages. In the
    # first round no program has emptied a stage yet, and the wait for the phase before returns at once.
    mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
    # `full` completes when all bytes of the stage have arrived: 128 x 128 of A, and of B the width of the tile.
    bar = full.index(stage)
    mbarrier.expect(bar, 128 * 128 + SUB * COUNT * 128)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(a_desc, [m0 + 64 * i, k0], bar, a_bufs.index(stage * 2 + i))
    for i in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(b_desc, [n0 + SUB * i, k0], bar, b_bufs.index(stage * COUNT + i))


@gluon.jit
def _product_loads(a_desc, b_desc, a_bufs, b_bufs, full, empty, table, M, N, k_blocks, num_m, num_n,
                   GROUPED: gl.constexpr, GROUP_M: gl.constexpr, SUB: gl.constexpr,
                   COUNT: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The warp that loads: all of K of one output tile, then of the next, as fast as stages become empty."""
    turn = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = place_of(tile, num_m, num_n, GROUP_M)
        expert, m0, _ = _rows(tile_m, table, M, GROUPED)
        n0 = expert * N + tile_n * (SUB * COUNT)
        for k in range(k_blocks):
            _fill(turn, a_desc, b_desc, a_bufs, b_bufs, full, empty, m0, n0, k * 128, SUB, COUNT, STAGES)
            turn += 1


@gluon.jit
def _product_sums(HALF: gl.constexpr, a_bufs, b_bufs, full, empty, c, sa, sb, table, M, N, k_blocks, num_m, num_n,
                  sa_stride, sb_expert, sb_row, c_stride, GROUPED: gl.constexpr, GROUP_M: gl.constexpr,
                  SUB: gl.constexpr, COUNT: gl.constexpr,
                  STAGES: gl.constexpr):  # fmt: skip
    """A warpgroup that multiplies: rows 64 * HALF to 64 * HALF + 63 of each tile."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SUB, 32])
    out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // SUB, SUB // 8], [4, 1], [1, 0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    zero = gl.zeros((64, SUB), gl.float32, layout=mma)
    turn = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = place_of(tile, num_m, num_n, GROUP_M)
        expert, m0, end = _rows(tile_m, table, M, GROUPED)
        m0 += 64 * HALF
        n0 = tile_n * (SUB * COUNT)
        # A's scales: one for each row and 128 of K. B's: one for each 128 columns, so two where the tile is 256 wide.
        sa_at = sa + m0 + rows
        ours = m0 + rows < end
        sb_at = sb + expert * sb_expert + (n0 // 128) * sb_row
        second = n0 + 128 < N
        scale = gl.load(sa_at, mask=ours, other=0.0)
        left, right = gl.load(sb_at), gl.load(sb_at + sb_row, mask=second)
        sums = (zero,) * COUNT
        for k in range(k_blocks):
            stage = turn % STAGES
            left_now, right_now = scale * left, scale * right
            # The next block's scales are asked for before this block's products, and so are there in time.
            more = k + 1 < k_blocks
            sa_at += sa_stride
            sb_at += 1
            scale = gl.load(sa_at, mask=ours & more, other=0.0)
            left, right = gl.load(sb_at, mask=more), gl.load(sb_at + sb_row, mask=more & second)
            # A product of 128 of K, in the tensor cores' 14 bits, then scaled and added in FP32.
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            a = a_bufs.index(stage * 2 + HALF)
            for i in gl.static_range(COUNT):
                b = b_bufs.index(stage * COUNT + i).permute((1, 0))
                part = warpgroup_mma(a, b, zero, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(0, deps=[part])
                # The last product has read the stage: it may be filled again while this warpgroup adds.
                if i == COUNT - 1:
                    mbarrier.arrive(empty.index(stage))
                factor = gl.expand_dims(left_now if i * SUB < 128 else right_now, 1)
                sums = sums[:i] + (sums[i] + part * factor,) + sums[i + 1 :]  # noqa: RUF005
            turn += 1
        # Stored in a layout of its own, in which a thread has eight neighbours of a row.
        r = m0 + gl.arange(0, 64, layout=gl.SliceLayout(1, out))
        n = n0 + gl.arange(0, SUB, layout=gl.SliceLayout(0, out))
        c_at = c + gl.expand_dims(r.to(gl.int64) * c_stride, 1) + gl.expand_dims(n, 0)
        for i in gl.static_range(COUNT):
            keep = gl.expand_dims(r < end, 1) & gl.expand_dims(n + SUB * i < N, 0)
            gl.store(c_at + SUB * i, gl.convert_layout(sums[i].to(c.dtype.element_ty), out), mask=keep)


@gluon.jit(do_not_specialize=["live", "M", "num_m", "sa_stride"])
def product_kernel(a_desc, b_desc, c, sa, sb, table, live, M, N, K, num_m, sa_stride, sb_expert, sb_row, c_stride,
                   GROUPED: gl.constexpr, GROUP_M: gl.constexpr, SUB: gl.constexpr,
                   COUNT: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr):  # fmt: skip
    """Each stage holds 128 of K: two halves of 64 rows of A, one a warpgroup, and `COUNT` parts of `SUB` rows of B.
    Rows of tiles are `num_m`, of groups as many as `live` says: the host may know only a bound."""
    if GROUPED:
        num_m = gl.load(live)
    a_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, 64, 128], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * COUNT, SUB, 128], b_desc.layout)
    full, empty = barriers(STAGES)
    k_blocks = gl.cdiv(K, 128)
    num_n = gl.cdiv(N, SUB * COUNT)
    # The first function runs on the warps of the launch, the others on 4 warps and 1 with the registers named; what
    # they leave is the first one's.
    gl.warp_specialize(
        [
            (_product_sums, (0, a_bufs, b_bufs, full, empty, c, sa, sb, table, M, N, k_blocks, num_m, num_n,
                             sa_stride, sb_expert, sb_row, c_stride, GROUPED, GROUP_M, SUB, COUNT, STAGES)),
            (_product_sums, (1, a_bufs, b_bufs, full, empty, c, sa, sb, table, M, N, k_blocks, num_m, num_n,
                             sa_stride, sb_expert, sb_row, c_stride, GROUPED, GROUP_M, SUB, COUNT, STAGES)),
            (_product_loads, (a_desc, b_desc, a_bufs, b_bufs, full, empty, table, M, N, k_blocks, num_m, num_n,
                              GROUPED, GROUP_M, SUB, COUNT, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 40],
    )  # fmt: skip


@gluon.jit
def _wgrad_loads(a_desc, b_desc, a_bufs, b_bufs, full, empty, starts, num_m, num_n, tiles, GROUP_M: gl.constexpr,
                 SUB: gl.constexpr, COUNT: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The warp that loads. K runs over the expert's blocks of 128 rows, and may be empty."""
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert = tile // (num_m * num_n)
        tile_m, tile_n = place_of(tile % (num_m * num_n), num_m, num_n, GROUP_M)
        for k in range(gl.load(starts + expert), gl.load(starts + expert + 1)):
            _fill(turn, a_desc, b_desc, a_bufs, b_bufs, full, empty, tile_m * 128, tile_n * (SUB * COUNT), k * 128,
                  SUB, COUNT, STAGES)  # fmt: skip
            turn += 1


@gluon.jit
def _wgrad_sums(HALF: gl.constexpr, a_bufs, b_bufs, scale_bufs, full, empty, ring, sa, sb, starts, M, N, num_m, num_n,
                tiles, sa_stride, sb_stride, GROUP_M: gl.constexpr, SUB: gl.constexpr, COUNT: gl.constexpr,
                STAGES: gl.constexpr):  # fmt: skip
    """A warpgroup that multiplies: rows 64 * HALF to 64 * HALF + 63 of each tile, added to what total holds.

    B's scales differ by column, so a thread needs a quarter of them. Each thread asks memory for its share two blocks
    ahead, and all of them pass through shared memory: read directly, they would hold 64 registers and come
    late. (By TMA they are as fast, and wrong in some tiles of some runs: docs/fp8.md.)"""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SUB, 32])
    in_rows: gl.constexpr = gl.SliceLayout(1, mma)
    in_cols: gl.constexpr = gl.SliceLayout(0, mma)
    line: gl.constexpr = gl.BlockedLayout([SUB * COUNT // 128], [32], [4], [0])
    rows = gl.arange(0, 64, layout=in_rows)
    cols = gl.arange(0, SUB * COUNT, layout=line)
    zero = gl.zeros((64, SUB), gl.float32, layout=mma)
    shared = scale_bufs.index(HALF)
    turn, added = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert = tile // (num_m * num_n)
        tile_m, tile_n = place_of(tile % (num_m * num_n), num_m, num_n, GROUP_M)
        m = tile_m * 128 + 64 * HALF + rows
        n = tile_n * (SUB * COUNT) + cols
        first, last = gl.load(starts + expert), gl.load(starts + expert + 1)
        place = (expert, tile_m * 128 + 64 * HALF, tile_n * (SUB * COUNT))
        if first < last:
            ask_first(ring, HALF, place)
        sa_at, sb_at = sa + first * sa_stride + m, sb + first * sb_stride + n
        ours, theirs = m < M, n < N
        # Scales of the first two blocks.
        a_scale = gl.load(sa_at, mask=ours & (first < last), other=0.0)
        b_scale = gl.load(sb_at, mask=theirs & (first < last), other=0.0)
        a_next = gl.load(sa_at + sa_stride, mask=ours & (first + 1 < last), other=0.0)
        b_next = gl.load(sb_at + sb_stride, mask=theirs & (first + 1 < last), other=0.0)
        sums = (zero,) * COUNT
        for k in range(first, last):
            stage = turn % STAGES
            # This block's scales go to shared memory, and those of two blocks on are asked for.
            shared.store(b_scale)
            a_now, a_scale, b_scale = a_scale, a_next, b_next
            more = k + 2 < last
            sa_at += sa_stride
            sb_at += sb_stride
            a_next = gl.load(sa_at + sa_stride, mask=ours & more, other=0.0)
            b_next = gl.load(sb_at + sb_stride, mask=theirs & more, other=0.0)
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            for i in gl.static_range(COUNT):
                b = b_bufs.index(stage * COUNT + i).permute((1, 0))
                part = warpgroup_mma(a_bufs.index(stage * 2 + HALF), b, zero, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(0, deps=[part])
                if i == COUNT - 1:
                    mbarrier.arrive(empty.index(stage))
                b_now = shared.slice(i * SUB, SUB).load(in_cols)
                term = part * gl.expand_dims(b_now, 0) * gl.expand_dims(a_now, 1)
                sums = sums[:i] + (sums[i] + term,) + sums[i + 1 :]  # noqa: RUF005
            turn += 1
        if first < last:
            width: gl.constexpr = ring[1].shape[3]
            for i in gl.static_range(COUNT):
                add_columns(ring, HALF, place, sums[i], added, i * SUB // width, SUB * COUNT // width)
            added += 1
    # Shared memory must last until the last stores have read it.
    tma.store_wait(0)


@gluon.jit
def wgrad_kernel(a_desc, b_desc, c_desc, sa, sb, starts, M, N, num_m, tiles, sa_stride, sb_stride,
                 GROUP_M: gl.constexpr, SUB: gl.constexpr, COUNT: gl.constexpr, STAGES: gl.constexpr,
                 REGISTERS: gl.constexpr, RING: gl.constexpr):  # fmt: skip
    """Stages as in `product_kernel`, and room for B's scales of one block for each warpgroup."""
    a_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, 64, 128], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * COUNT, SUB, 128], b_desc.layout)
    scale_bufs = gl.allocate_shared_memory(gl.float32, [2, SUB * COUNT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ring = make_ring(c_desc, RING)
    full, empty = barriers(STAGES)
    num_n = gl.cdiv(N, SUB * COUNT)
    # The first function runs on the warps of the launch, the others on 4 warps and 1 with the registers named; what
    # they leave is the first one's.
    gl.warp_specialize(
        [
            (_wgrad_sums, (0, a_bufs, b_bufs, scale_bufs, full, empty, ring, sa, sb, starts, M, N, num_m, num_n, tiles,
                           sa_stride, sb_stride, GROUP_M, SUB, COUNT, STAGES)),
            (_wgrad_sums, (1, a_bufs, b_bufs, scale_bufs, full, empty, ring, sa, sb, starts, M, N, num_m, num_n, tiles,
                           sa_stride, sb_stride, GROUP_M, SUB, COUNT, STAGES)),
            (_wgrad_loads, (a_desc, b_desc, a_bufs, b_bufs, full, empty, starts, num_m, num_n, tiles, GROUP_M, SUB,
                            COUNT, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def _descriptor(values: Tensor, rows: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return TensorDescriptor.from_tensor(values.flatten(0, -2), [rows, TILE], layout)


def product(a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16,
            config: TileConfig = PRODUCT) -> Tensor:  # fmt: skip
    """A Bᵀ: [M, K] in 1x128 tiles times [N, K], or with `groups` [X, N, K], in 128x128 blocks, to [M, N].

    K and N are multiples of 16 (TMA's alignment).
    """
    (m, k), n = a.values.shape, b.values.shape[-2]
    c = torch.empty(m, n, dtype=dtype, device=a.values.device)
    num_m = blocks(m) if groups is None else groups.blocks
    if not num_m:
        return c
    tiles = num_m * ceil_div(n, config.sub * config.count)
    # Dense kernels read neither table.
    table, live = (c, c) if groups is None else (groups.tables.blocks, groups.tables.starts[-1:])
    product_kernel[(programs(c.device, tiles),)](
        _descriptor(a.values, 64), _descriptor(b.values, config.sub), c, a.scales, b.scales, table, live, m, n, k,
        num_m, a.scales.stride(1), b.scales.stride(0) if groups else 0, b.scales.stride(-2), c.stride(0),
        GROUPED=groups is not None, GROUP_M=config.group_m, SUB=config.sub, COUNT=config.count,
        STAGES=config.stages, REGISTERS=config.registers, num_warps=4,
    )  # fmt: skip
    return c


def wgrad(a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor, config: TileConfig = WGRAD) -> None:
    """total[x] += A_x B_xᵀ: A [M, P], B [N, P] in 1x128 tiles over the padded rows P of all experts, total FP32
    [X, M, N]."""
    m, n = a.values.shape[0], b.values.shape[0]
    num_m = blocks(m)
    tiles = len(groups.counts) * num_m * ceil_div(n, config.sub * config.count)
    if not groups.blocks:
        return
    # Sums behind a matrix of odd sizes are not where TMA can reach them.
    sums = total if addable(total) else total.clone()
    wgrad_kernel[(programs(total.device, tiles),)](
        _descriptor(a.values, 64), _descriptor(b.values, config.sub), sums_descriptor(sums), a.scales, b.scales,
        groups.tables.starts, m, n, num_m, tiles, a.scales.stride(1), b.scales.stride(1),
        GROUP_M=config.group_m, SUB=config.sub, COUNT=config.count, STAGES=config.stages,
        REGISTERS=config.registers, RING=RING, num_warps=4,
    )  # fmt: skip
    if sums is not total:
        total.copy_(sums)
