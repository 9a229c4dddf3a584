"""Rows moved, summed and put in order by Triton: what `routing` and `payload` define in torch, for tensors on a GPU.

torch's `embedding_bag` sums the rows of a token at a fifth of the memory's speed (614 us for 32768 rows of V3's hidden
size, where 125 would do), its gathers leave the zeros to a second kernel, and a stable argsort of 64-bit keys is eight
passes; a routing made of them is fifty launches, which the host cannot issue as fast as they run.

Every result has the bits of its definition: sums start at +0 and add in FP32 in the order of `source`, one after the
other, and are rounded once; the sort counts and is stable, without atomics. Imported only where rows are on a GPU.

Legend as in routing.py; B blocks of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dryvine.comm.dispatch.by_rank import ByRank
from dryvine.comm.dispatch.payload import Column
from dryvine.comm.dispatch.routing import RowOrder, padded

# Pairs that a program sorts, and experts that it compares them with at a time: 128 x 128 comparisons fit in registers.
BLOCK = 128
# Experts that `place_kernel` adds up at a time: fewer, so that registers are left for a second block on the SM.
PART = 32
# Elements that a program moves or sums: of BF16, one load of 16 bytes for each thread and addend.
TILE = 1024
# Bytes of the widest load.
VECTOR = 16
# The integers as which rows are copied, by size in bytes.
UNITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


# ---- rows


@triton.jit
def tile(R, width, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows and columns, and which of them exist; columns first, so that neighbours share rows."""
    parts = tl.cdiv(width * VEC, COLS)
    r = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % parts * COLS + tl.arange(0, COLS)
    return r, c, (r < R)[:, None] & (c < width * VEC)[None, :]


@triton.jit
def row_starts(rows, at, row_stride, own, first, owned, own_stride, BESIDE: tl.constexpr):
    """Where rows begin; of a `ByRank` with BESIDE: rows first, first + 1, ... are in `own`."""
    start = rows + at * row_stride
    if BESIDE:
        here = (at >= first) & (at < first + owned)
        start = tl.where(here, own + (at - first) * own_stride, start)
    return start


@triton.jit(do_not_specialize=["index", "R", "first", "owned"])
def gather_kernel(rows, index, out, R, width, row_stride, out_stride, own, first, owned, own_stride,
                  BESIDE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    r, c, inside = tile(R, width, VEC, ROWS, COLS)
    at = tl.load(index + r, mask=r < R, other=-1)
    # A negative index loads nothing, so that its row is stored as zeros.
    there = inside & (at >= 0)[:, None]
    start = row_starts(rows, at[:, None], row_stride * VEC, own, first, owned, own_stride * VEC, BESIDE)
    v = tl.load(start + c[None, :], mask=there, other=0)
    tl.store(out + r[:, None] * (out_stride * VEC) + c[None, :], v, mask=inside)


@triton.jit(do_not_specialize=["source", "begin", "R", "first", "owned"])
def sum_kernel(rows, source, begin, out, R, width, row_stride, out_stride, own, first, owned, own_stride,
               BESIDE: tl.constexpr, EVEN: tl.constexpr, VEC: tl.constexpr, MOST: tl.constexpr,
               ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Unrolled, so that the loads of all addends are in flight before the first is added. EVEN: a result has MOST
    places in `source`, and a negative one adds nothing."""
    r, c, inside = tile(R, width, VEC, ROWS, COLS)
    if EVEN:
        first_place = r * MOST
        count = tl.where(r < R, MOST, 0)
    else:
        first_place = tl.load(begin + r, mask=r < R, other=0)
        count = tl.load(begin + r + 1, mask=r < R, other=0) - first_place
    total = tl.zeros([ROWS, COLS], tl.float32)
    for k in tl.static_range(MOST):
        # `at` alone becomes a column: Triton (3.6, 3.7) fails where the mask that it was loaded by does so too.
        at = tl.load(source + first_place + k, mask=k < count, other=-1)[:, None]
        start = row_starts(rows, at, row_stride * VEC, own, first, owned, own_stride * VEC, BESIDE)
        v = tl.load(start + c[None, :], mask=inside & (at >= 0), other=0.0)
        total += v.to(tl.float32)
    tl.store(out + r[:, None] * (out_stride * VEC) + c[None, :], total.to(out.dtype.element_ty), mask=inside)


def _vector(*tensors: Tensor) -> int:
    """Bytes, at most 16, that the rows [N, C] of all of these are whole multiples of, and start on multiples of."""
    width = VECTOR
    for t in tensors:
        size = t.element_size()
        width = gcd(width, t.data_ptr(), t.stride(0) * size, t.shape[1] * size)
    return width


def _shape(rows: int, width: int) -> tuple[tuple[int], int, int]:
    """Grid, and the rows and columns of a tile."""
    cols = min(TILE, triton.next_power_of_2(width))
    high = TILE // cols
    return (triton.cdiv(rows, high) * triton.cdiv(width, cols),), high, cols


def _flat(rows: Tensor) -> Tensor:
    """[N, C] with unit stride within a row."""
    flat = rows if rows.dim() == 2 else rows.reshape(len(rows), rows.shape[1:].numel())
    if flat.shape[1] == 1:
        # The stride of such a dimension is arbitrary in torch.
        return flat.as_strided(flat.shape, (flat.stride(0), 1))
    return flat if flat.stride(1) == 1 else flat.contiguous()


class _Beside(NamedTuple):
    """Rows `first`, `first` + 1, ... of a `ByRank`, [N, C], which lie elsewhere."""

    rows: Tensor
    first: int


def _gather(rows: Tensor, index: Tensor, out: Tensor, beside: _Beside | None = None) -> Tensor:
    """`payload.gather` into `out` [R, ...], with any strides between rows."""
    if out.numel():
        source, target = _flat(rows), _flat(out)
        own = source if beside is None else beside.rows
        wide = _vector(source, target, own)
        unit = min(wide, max(UNITS))
        source, target, own = (t.view(UNITS[unit]) for t in (source, target, own))
        vec = wide // unit
        grid, high, cols = _shape(*target.shape)
        gather_kernel[grid](
            source, index, target, len(index), target.shape[1] // vec, source.stride(0) // vec,
            target.stride(0) // vec, own, beside.first if beside else 0, len(own), own.stride(0) // vec,
            beside is not None, vec, high, cols, num_warps=4,
        )  # fmt: skip
    return out


def gather(rows: Tensor, index: Tensor) -> Tensor:
    return _gather(rows, index, rows.new_empty((len(index), *rows.shape[1:])))


def gather_by_rank(sent: ByRank, index: Tensor) -> Tensor:
    out = sent.own.new_empty((len(index), *sent.own.shape[1:]))
    return _gather(sent.rows, index, out, _Beside(_flat(sent.own), sent.first))


def gather_in(buffer: Tensor, columns: Sequence[Column], tensors: Sequence[Tensor], indexes: Sequence[Tensor]) -> None:
    for column, tensor, index in zip(columns, tensors, indexes, strict=True):
        _gather(tensor, index, column.of(buffer))


def gather_out(buffer: Tensor, columns: Sequence[Column], index: Tensor) -> list[Tensor]:
    return [gather(column.of(buffer), index) for column in columns]


def _sum(rows: Tensor, source: Tensor, begin: Tensor | None, most: int, out: Tensor, beside: _Beside | None) -> Tensor:
    """`routing.sum_rows`; without `begin`, `sum_present`."""
    if out.numel():
        given, target = _flat(rows), _flat(out)
        own = given if beside is None else beside.rows
        vec = _vector(given, target, own) // rows.element_size()
        grid, high, cols = _shape(*target.shape)
        sum_kernel[grid](
            given, source, source if begin is None else begin, target, len(target), target.shape[1] // vec,
            given.stride(0) // vec, target.stride(0) // vec, own, beside.first if beside else 0, len(own),
            own.stride(0) // vec, beside is not None, begin is None, vec, most, high, cols, num_warps=4,
        )  # fmt: skip
    return out


def sum_rows(rows: Tensor, source: Tensor, begin: Tensor, most: int, out: Tensor | None = None) -> Tensor:
    made = rows.new_empty((len(begin) - 1, *rows.shape[1:])) if out is None else out
    return _sum(rows, source, begin, most, made, None)


def sum_present(rows: Tensor, source_NK: Tensor) -> Tensor:
    results, most = source_NK.shape
    return _sum(rows, source_NK, None, most, rows.new_empty((results, *rows.shape[1:])), None)


def sum_by_rank(sent: ByRank, source_NK: Tensor) -> Tensor:
    results, most = source_NK.shape
    out = sent.own.new_empty((results, *sent.own.shape[1:]))
    return _sum(sent.rows, source_NK, None, most, out, _Beside(_flat(sent.own), sent.first))


# ---- order


@triton.jit(do_not_specialize=["expert", "P", "B"])
def tally_kernel(expert, tallies, P, B, E, K: tl.constexpr, BLOCK: tl.constexpr):
    """`tallies` int32 [E + 1, B]: pairs of each block for each expert, and whether a token in it chose one twice."""
    block, part = tl.program_id(0), tl.program_id(1)
    p = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(expert + p, mask=p < P, other=-1).to(tl.int32)
    # One column of comparisons per expert of this part; their sum is its tally.
    e = part * BLOCK + tl.arange(0, BLOCK)
    tl.store(tallies + e * B + block, tl.sum((x[:, None] == e[None, :]).to(tl.int32), 0), mask=e < E)
    if part == 0:
        # Each pair against the pairs of its token that lie up to K - 1 places before it.
        again = tl.zeros([BLOCK], tl.int32)
        for back in tl.static_range(1, K):
            before = tl.load(expert + p - back, mask=(p < P) & (p % K >= back), other=-2).to(tl.int32)
            again |= (before == x).to(tl.int32)
        tl.store(tallies + E * B + block, tl.max(again, 0))


@triton.jit(do_not_specialize=["B"])
def scan_kernel(tallies, message, B, E, X, CHUNK: tl.constexpr):
    """Each row of `tallies` becomes what lies before each block; its sum goes into the message."""
    e = tl.program_id(0)
    total = tl.full((), 0, tl.int32)
    for first in range(0, B, CHUNK):
        b = first + tl.arange(0, CHUNK)
        n = tl.load(tallies + e * B + b, mask=b < B, other=0)
        tl.store(tallies + e * B + b, tl.cumsum(n, 0) - n + total, mask=b < B)
        total += tl.sum(n, 0)
    if e < E:
        # The place of expert e in the message to its rank, which has X experts and the refusal.
        tl.store(message + e // X * (X + 1) + e % X, total)
    else:
        for w in range(0, E // X):
            tl.store(message + w * (X + 1) + X, (total > 0).to(tl.int64))


@triton.jit(do_not_specialize=["expert", "P", "B"])
def place_kernel(expert, tallies, message, pair, token, place, P, B, E, X, K,
                 BLOCK: tl.constexpr, PART: tl.constexpr):  # fmt: skip
    """A pair goes behind all pairs of lower experts, of its own in earlier blocks, and of its own earlier here."""
    block = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    p = block * BLOCK + i
    x = tl.load(expert + p, mask=p < P, other=E).to(tl.int32)
    # Pairs of the same expert earlier in this block.
    at = tl.sum(((x[:, None] == x[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
    # All pairs of lower experts.
    for first in range(0, E, PART):
        e = first + tl.arange(0, PART)
        n = tl.load(message + e // X * (X + 1) + e % X, mask=e < E, other=0).to(tl.int32)
        at += tl.sum(tl.where(e[None, :] < x[:, None], n[None, :], 0), 1)
    # Pairs of the same expert in earlier blocks.
    at += tl.load(tallies + x * B + block, mask=p < P, other=0)
    tl.store(place + p, at, mask=p < P)
    tl.store(pair + at, p, mask=p < P)
    tl.store(token + at, p // K, mask=p < P)


def by_expert(experts_TK: Tensor, ranks: int, experts: int) -> RowOrder:
    """Three launches."""
    chosen, (tokens, choices), share = experts_TK.contiguous(), experts_TK.shape, experts // ranks
    pairs = tokens * choices
    blocks = triton.cdiv(pairs, BLOCK)
    tallies = torch.empty((experts + 1, blocks), dtype=torch.int32, device=chosen.device)
    message = torch.empty((ranks, share + 1), dtype=torch.int64, device=chosen.device)
    pair, token, place = torch.empty((3, pairs), dtype=torch.int64, device=chosen.device)
    if pairs:
        parts = triton.cdiv(experts, BLOCK)
        tally_kernel[(blocks, parts)](chosen, tallies, pairs, blocks, experts, choices, BLOCK, num_warps=8)
    scan_kernel[(experts + 1,)](tallies, message, blocks, experts, share, 1024, num_warps=4)
    if pairs:
        place_kernel[(blocks,)](
            chosen, tallies, message, pair, token, place, pairs, blocks, experts, share, choices, BLOCK, PART,
            num_warps=8,
        )  # fmt: skip
    return RowOrder(pair, token, place.view_as(experts_TK), message)


def stable_order(keys: Tensor, below: int) -> Tensor:
    return by_expert(keys, 1, below).pair


@triton.jit
def arrive_kernel(message, order, back, W, X, alignment, WIDE: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr):
    """Program (w, x) writes both ways between the rows that arrive from rank w for expert x and their result rows."""
    source, mine = tl.program_id(0) // X, tl.program_id(0) % X
    w, x, xs = tl.arange(0, WIDE)[:, None], tl.arange(0, HIGH)[None, :], tl.arange(0, HIGH)
    n = tl.load(message + w * (X + 1) + x, mask=(w < W) & (x < X), other=0).to(tl.int32)
    # Results of this expert lie from `begin` to `end`, padding included.
    padded = tl.cdiv(tl.sum(n, 0), alignment) * alignment
    begin = tl.sum(tl.where(xs < mine, padded, 0), 0)
    end = begin + tl.sum(tl.where(xs == mine, padded, 0), 0)
    # What arrives lies by (rank, expert), results by (expert, rank).
    before = tl.where((w < source) | ((w == source) & (x < mine)), n, 0)
    from_ = tl.sum(tl.sum(before, 1), 0)
    to = begin + tl.sum(tl.sum(tl.where((w < source) & (x == mine), n, 0), 1), 0)
    count = tl.sum(tl.sum(tl.where((w == source) & (x == mine), n, 0), 1), 0)
    i = tl.arange(0, BLOCK)
    for first in range(0, count, BLOCK):
        j = first + i
        tl.store(back + from_ + j, to + j, mask=j < count)
        tl.store(order + to + j, from_ + j, mask=j < count)
    if source == W - 1:
        # The last rank's program also marks the padding behind its rows.
        for hole in range(to + count, end, BLOCK):
            tl.store(order + hole + i, tl.full([BLOCK], -1, tl.int64), mask=hole + i < end)


def arrive(message: Tensor, used: Sequence[int], alignment: int) -> tuple[Tensor, Tensor]:
    """One launch."""
    ranks, share = message.shape[0], message.shape[1] - 1
    order = torch.empty(sum(padded(used, alignment)), dtype=torch.int64, device=message.device)
    back = torch.empty(sum(used), dtype=torch.int64, device=message.device)
    wide, high = triton.next_power_of_2(ranks), triton.next_power_of_2(share)
    arrive_kernel[(ranks * share,)](
        message.contiguous(), order, back, ranks, share, alignment, wide, high, 256, num_warps=4
    )
    return order, back
