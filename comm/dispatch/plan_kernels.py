"""The plan of `token_plan` as two Triton kernels: places of all pairs without a sort, an atomic or a read by the host.

Every block counts its pairs by expert; then each finds what lies before it in the counts of all, which it adds up by
itself: as long as there are a few hundred blocks, that is quicker than a launch between the two. A block holds pairs of
one rank. Experts are visited in parts, so that comparisons stay in registers.

Legend as in token_plan.py; P pairs of a rank (M * K), B blocks, Q of them of a rank.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dryvine.comm.dispatch.by_rank import ByRank
from dryvine.comm.dispatch.token_plan import ABSENT, Places, PlanGroup

BLOCK = 256  # pairs of a program
PART = 16  # experts, or pairs, that they are compared with at a time
CHUNK = 64  # counts of blocks that are added at a time


@triton.jit
def own_pairs(chosen, own, rank, P, Q, BLOCK: tl.constexpr):
    """Where the choices of this program's rank lie, the rank, and the first of the program's own."""
    source = tl.program_id(0) // Q
    choices = tl.where(source == rank, own, chosen + source.to(tl.int64) * P)
    return choices, source, tl.program_id(0) % Q * BLOCK


@triton.jit
def tally_kernel(chosen, own, tallies, rank, P, Q, B, X,
                 K: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr):  # fmt: skip
    """`tallies` int32 [X + 1, B]: pairs of each block for each expert, and whether a token in it chose one twice."""
    choices, _, begin = own_pairs(chosen, own, rank, P, Q, BLOCK)
    i = begin + tl.arange(0, BLOCK)
    x = tl.load(choices + i, mask=i < P, other=-1)
    for first in range(0, X, PART):
        e = first + tl.arange(0, PART)
        n = tl.sum((x[:, None] - rank * X == e[None, :]).to(tl.int32), 0)
        tl.store(tallies + e * B + tl.program_id(0), n, mask=e < X)
    # Each pair against the pairs of its token that lie up to K - 1 places before it.
    again = tl.zeros([BLOCK], tl.int32)
    for back in tl.static_range(1, K):
        before = tl.load(choices + i - back, mask=(i < P) & (i % K >= back), other=-1)
        again |= ((before == x) & (x >= 0)).to(tl.int32)
    tl.store(tallies + X * B + tl.program_id(0), tl.max(again, 0))


@triton.jit
def earlier_here(choices, x, begin, P, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Pairs of the same expert earlier in this block."""
    i, count = begin + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, PART):
        j = begin + first + tl.arange(0, PART)
        other = tl.load(choices + j, mask=j < P, other=-1)
        count += tl.sum(((x[:, None] == other[None, :]) & (j[None, :] < i[:, None])).to(tl.int32), 1)
    return count


@triton.jit(do_not_specialize=["T"])
def place_kernel(chosen, own, tallies, message, pair, token, row, total, owner,
                 rank, room, alignment, T, M, P, Q, B, W, X,
                 K: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """A pair goes behind all of lower experts, of its own in earlier blocks, and of its own earlier here."""
    block = tl.program_id(0)
    choices, source, mine = own_pairs(chosen, own, rank, P, Q, BLOCK)
    i = mine + tl.arange(0, BLOCK)
    x = tl.load(choices + i, mask=i < P, other=-1)
    at = earlier_here(choices, x, mine, P, BLOCK, PART)
    begin = tl.full((), 0, tl.int32)
    for first in range(0, X, PART):
        e = first + tl.arange(0, PART)
        before, count = tl.zeros([PART], tl.int32), tl.zeros([PART], tl.int32)
        for blocks in range(0, B, CHUNK):
            b = blocks + tl.arange(0, CHUNK)
            n = tl.load(tallies + e[:, None] * B + b[None, :], mask=(e < X)[:, None] & (b < B)[None, :], other=0)
            before += tl.sum(tl.where(b[None, :] < block, n, 0), 1)
            count += tl.sum(n, 1)
        padded = tl.cdiv(count, alignment) * alignment
        start = begin + tl.cumsum(padded, 0) - padded
        begin += tl.sum(padded, 0)
        at += tl.sum(tl.where(x[:, None] - rank * X == e[None, :], (start + before)[None, :], 0), 1)
        if block == 0:
            tl.store(message + e, tl.maximum(tl.minimum(count, room - start), 0), mask=e < X)
    local = x - rank * X
    placed = (i < P) & (local >= 0) & (local < X) & (at < room)
    p = source * P + i
    tl.store(row + p, tl.where(placed, at, -1), mask=i < P)
    tl.store(pair + at, p, mask=placed)
    tl.store(token + at, p // K, mask=placed)
    if block == 0:
        refuse(tallies + X * B, message + X, Q, W, CHUNK)
        tl.store(message + X + W, begin)
    if source == rank:
        # Where this rank's tokens find their answers.
        tl.store(owner + i, x // X * P + i, mask=i < T * K)
        for first in range(mine, T * W, Q * BLOCK):
            j = first + tl.arange(0, BLOCK)
            tl.store(total + j, j % W * M + j // W, mask=j < T * W)


@triton.jit
def refuse(tallied, message, Q, W, CHUNK: tl.constexpr):
    """`message` [W]: 1 for each rank of which a block has a token that chose an expert twice."""
    for w in range(0, W):
        found = tl.full((), 0, tl.int32)
        for first in range(0, Q, CHUNK):
            b = first + tl.arange(0, CHUNK)
            found = tl.maximum(found, tl.max(tl.load(tallied + w * Q + b, mask=b < Q, other=0), 0))
        tl.store(message + w, found)


def places(chosen: ByRank, own_TK: Tensor, group: PlanGroup, room: int) -> Places:
    """Three launches, one of which marks the places of no pair."""
    (ranks, most, top_k), tokens = chosen.window.shape, len(own_TK)
    share, pairs = group.experts // ranks, most * top_k
    of_rank = triton.cdiv(pairs, BLOCK)
    blocks = ranks * of_rank
    new = partial(torch.empty, dtype=torch.int64, device=chosen.window.device)
    tallies = new((share + 1, blocks), dtype=torch.int32)
    pair, token = new((2, room)).fill_(ABSENT)
    message, row = new(share + ranks + 1), new((ranks * most, top_k))
    total, owner = new((tokens, ranks)), new((tokens, top_k))
    tally_kernel[(blocks,)](
        chosen.window, chosen.own, tallies, chosen.rank, pairs, of_rank, blocks, share, top_k, BLOCK, PART, num_warps=8
    )
    place_kernel[(blocks,)](
        chosen.window, chosen.own, tallies, message, pair, token, row, total, owner, chosen.rank, room,
        group.alignment, tokens, most, pairs, of_rank, blocks, ranks, share, top_k, BLOCK, PART, CHUNK, num_warps=8,
    )  # fmt: skip
    return Places(message, pair, token, row, total, owner)
