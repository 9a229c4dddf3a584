"""The tables of expert groups in one launch: what groups.py defines. On the host they are a Python loop over all blocks
for each layer and microbatch, and an upload. Imported only where rows are on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dryvine.comm.integers import round_up
from dryvine.trainer.tensors.groups import Tables
from dryvine.trainer.tensors.tiles import TILE

BLOCK = 128  # entries that a program writes at a time
ALIGNED = 4  # int32 in 16 bytes: Triton compiles a kernel again for an address that is no multiple of those


@triton.jit(do_not_specialize=["counts", "R", "B"])
def tables_kernel(counts, ends, starts, table, X, R, B, TILE: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr):
    """Program x writes what belongs to expert x, and program X the number of blocks and the entries without rows."""
    x, xs = tl.program_id(0), tl.arange(0, HIGH)
    n = tl.load(counts + xs, mask=xs < X, other=0).to(tl.int32)
    tall = tl.cdiv(n, TILE)
    # Rows and blocks of the experts before this one, and its own.
    row, block = tl.sum(tl.where(xs < x, n, 0), 0), tl.sum(tl.where(xs < x, tall, 0), 0)
    rows, own = tl.sum(tl.where(xs == x, n, 0), 0), tl.sum(tl.where(xs == x, tall, 0), 0)
    tl.store(starts + x, block)
    i = tl.arange(0, BLOCK)
    if x < X:
        tl.store(ends + x, row + rows)
        for first in range(0, own, BLOCK):
            at, mine = table + 3 * (block + first + i), first + i < own
            tl.store(at, x + 0 * i, mask=mine)
            tl.store(at + 1, row + TILE * (first + i), mask=mine)
            tl.store(at + 2, row + rows + 0 * i, mask=mine)
    else:
        for first in range(block, B, BLOCK):
            at, dead = table + 3 * (first + i), first + i < B
            tl.store(at, 0 * i, mask=dead)
            tl.store(at + 1, R + 0 * i, mask=dead)
            tl.store(at + 2, R + 0 * i, mask=dead)


def tables_of(counts_X: Tensor, rows: int, most: int) -> Tables:
    experts = len(counts_X)
    sizes = [round_up(size, ALIGNED) for size in (experts, experts + 1, 3 * most)]
    ends, starts, table = torch.empty(sum(sizes), dtype=torch.int32, device=counts_X.device).split(sizes)
    high = triton.next_power_of_2(experts)
    tables_kernel[(experts + 1,)](counts_X, ends, starts, table, experts, rows, most, TILE, high, BLOCK, num_warps=4)
    return Tables(ends[:experts], starts[: experts + 1], table[: 3 * most].view(-1, 3))
