"""What the persistent Hopper kernels of both rooms share (fp8/kernels/hopper.py, model/kernels/grouped.py), in Gluon.

Persistent: one CTA to an SM, each walking over output tiles, so that the loads of its next tile start before this one
is stored. One warp loads by TMA into stages of shared memory, two warpgroups multiply; a pair of barriers for each
stage hands it from one side to the other.
"""

# Gluon reads the annotations of kernels at run time, so no `from __future__ import annotations` here.
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def place_of(tile, num_m, num_n, GROUP_M: gl.constexpr):
    """Row and column of a tile. Tiles are walked in bands of GROUP_M rows, whose operands stay in L2."""
    width = GROUP_M * num_n
    first = (tile // width) * GROUP_M
    # The last band may have fewer rows.
    height = min(num_m - first, GROUP_M)
    return first + (tile % width) % height, (tile % width) // height


@gluon.jit
def barriers(STAGES: gl.constexpr):
    """Two barriers for each stage: `full` when its loads have arrived, `empty` when both warpgroups are done."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return full, empty


def programs(device: torch.device, tiles: int) -> int:
    """The grid of a persistent kernel: one program to an SM, and no more than there are tiles."""
    return min(tiles, torch.cuda.get_device_properties(device).multi_processor_count)
