"""FP32 sums in memory that the persistent Hopper kernels add weight gradients to, in Gluon: by TMA, through a ring.

A tile of 128 x 256 sums is 128 KiB to read and to write, as much time as the products of 900 rows. Loads and stores of
threads take turns in that time: each thread waits for what memory holds, adds, stores, and only then multiplies again.
Here a ring of chunks in shared memory is between: the first chunks of a tile are asked for before its products, each
of the others when the chunk before its own has left, and stores end while the next tile's products run.

The alternatives, measured on an H100 for 64 experts of 512 rows, 1536 x 2048 (848 us with threads, 755 with the ring,
600 is what memory allows; docs/log.md): adds by L2 itself (`red`, 1082 us) and a prefetch of each tile into L2
(1077 us) are slower than what they replace. The ring costs a stage of operands, 48 KiB of shared memory.

A ring is (descriptor of the sums, chunks, barriers); `HALF` is the warpgroup, which has half of a tile's rows and half
of the ring; `place` is (expert, row, column) of its half of the tile. Chunks are those of a tile, from left to right.
"""

# Gluon reads the annotations of kernels at run time, so no `from __future__ import annotations` here.
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

CHUNK = 32  # columns of a chunk: 8 KiB, a line of 128 bytes in each of 64 rows
RING = 4  # chunks of each warpgroup


def sums_descriptor(total_XMN: Tensor) -> TensorDescriptor:
    """Of FP32 sums [X, M, N]. By expert, so that a tile beyond the last row of one does not reach the next."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
    return TensorDescriptor.from_tensor(total_XMN, [1, 64, CHUNK], layout)


def addable(total_XMN: Tensor) -> bool:
    """Whether TMA takes the sums: it wants a multiple of 16 bytes as their address and as the length of a row."""
    return total_XMN.data_ptr() % 16 == 0 and total_XMN.shape[-1] % 4 == 0


@gluon.jit
def make_ring(desc, RING: gl.constexpr):
    chunks = gl.allocate_shared_memory(gl.float32, [2 * RING, 1, 64, desc.block_shape[2]], desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [2 * RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * RING):
        mbarrier.init(loaded.index(i), count=1)
    return desc, chunks, loaded


@gluon.jit
def _ask(ring, HALF: gl.constexpr, place, C: gl.constexpr):
    """Start the load of chunk C into its slot."""
    desc, chunks, loaded = ring
    expert, m, n = place
    slot: gl.constexpr = HALF * (chunks.shape[0] // 2) + C % (chunks.shape[0] // 2)
    mbarrier.expect(loaded.index(slot), 64 * chunks.shape[3] * 4)
    tma.async_copy_global_to_shared(desc, [expert, m, n + chunks.shape[3] * C], loaded.index(slot), chunks.index(slot))


@gluon.jit
def ask_first(ring, HALF: gl.constexpr, place):
    """Start to load the first chunks of a tile, before its products."""
    # The stores of the tile before have read the ring.
    tma.store_wait(0)
    for i in gl.static_range(ring[1].shape[0] // 2):
        _ask(ring, HALF, place, i)


@gluon.jit
def _add_chunk(ring, HALF: gl.constexpr, place, part, tiles, C: gl.constexpr, COUNT: gl.constexpr):
    desc, chunks, loaded = ring
    expert, m, n = place
    depth: gl.constexpr = chunks.shape[0] // 2
    slot: gl.constexpr = HALF * depth + C % depth
    # A barrier's phase flips with each chunk that its slot has held: COUNT / depth of a tile.
    mbarrier.wait(loaded.index(slot), (tiles * (COUNT // depth) + C // depth) & 1)
    chunk = chunks.index(slot).reshape([64, chunks.shape[3]])
    chunk.store(chunk.load(part.type.layout) + part)
    # Stores of threads are seen by TMA from here on.
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [expert, m, n + chunks.shape[3] * C], chunks.index(slot))
    if (C > 0) and (C - 1 + depth < COUNT):
        # All stores but this one have read their chunks: the one before makes room.
        tma.store_wait(1)
        _ask(ring, HALF, place, C - 1 + depth)


@gluon.jit
def add_columns(ring, HALF: gl.constexpr, place, sums, tiles, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Add products, from chunk FIRST of a tile's COUNT, to what memory holds. The warpgroup has added `tiles` tiles."""
    width: gl.constexpr = ring[1].shape[3]
    if sums.shape[1] > width:
        half: gl.constexpr = sums.shape[1] // 2
        left, right = gl.split(gl.permute(gl.reshape(sums, [64, 2, half]), [0, 2, 1]))
        add_columns(ring, HALF, place, left, tiles, FIRST, COUNT)
        add_columns(ring, HALF, place, right, tiles, FIRST + half // width, COUNT)
    else:
        # The product's own layout: where a thread keeps its numbers does not change.
        layout: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16]
        )
        part = gl.convert_layout(sums, layout, assert_trivial=True)
        _add_chunk(ring, HALF, place, part, tiles, FIRST, COUNT)
