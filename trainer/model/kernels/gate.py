"""`route` of model/gate.py on a GPU. Forward, one kernel scores, chooses, weighs and counts; the balance loss takes a
second one, since it needs the whole sequence's counts. Backward is one kernel. Scores are never written but computed
again from the logits, and without balance loss a sigmoid's backward needs only the scores of the chosen.

Tallies are integers, so atomics add them up to the same bits in any order; a program adds once to each expert. A
program is one warp, so that no reduction waits at a barrier, and takes four tokens, whose reductions hide each other's
latency.

Legend as in model/gate.py; M experts of a group. A tile has a column c = g * M2 + m for each expert: M2 and G2 are the
next powers of two, and the columns between are kept at -inf.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from triton.runtime.jit import JITFunction

from dryvine.comm.integers import ceil_div
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.tensors.context import Context

# Tokens of a program, if registers allow: so many that their columns together are at most TILE, 32 a thread.
ROWS = 4
TILE = 1024


@triton.jit
def place(T, ROWS: tl.constexpr):
    """This program's sequence, its tokens' numbers in the batch [ROWS, 1], and which of them exist."""
    parts = tl.cdiv(T, ROWS)
    s = (tl.program_id(0) // parts).to(tl.int64)
    t = (tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS))[:, None]
    return s, s * T + t, t < T


@triton.jit
def columns(G: tl.constexpr, M: tl.constexpr, G2: tl.constexpr, M2: tl.constexpr):
    """The columns of a tile, the expert of each, and whether there is one: each [1, G2 * M2]."""
    c = tl.arange(0, G2 * M2)[None, :]
    return c, c // M2 * M + c % M2, (c // M2 < G) & (c % M2 < M)


@triton.jit
def extent(x):
    """What a softmax needs of a row: its greatest x, and the sum of e^(x - greatest)."""
    greatest = tl.max(x, 1, keep_dims=True)
    return greatest, tl.sum(tl.exp(x - greatest), 1, keep_dims=True)


@triton.jit
def score(x, greatest, total, SIGMOID: tl.constexpr):
    """Logits, all of a row or some -> their scores. A sigmoid uses no extent, and the compiler drops it."""
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return tl.exp(x - greatest) / total


@triton.jit
def ranked(x, real):
    """Scores in an order without NaN: NaN above all others, and columns without an expert below all."""
    return tl.where(real, tl.where(x == x, x, float("inf")), float("-inf"))


@triton.jit
def without_best(x, c):
    """The column of each row's greatest, of equals the first; and x with -inf there."""
    at = tl.min(tl.where(x == tl.max(x, 1, keep_dims=True), c, x.shape[1]), 1, keep_dims=True)
    return at, tl.where(c == at, float("-inf"), x)


@triton.jit
def in_best_groups(x, G2: tl.constexpr, M2: tl.constexpr, BEST: tl.constexpr, LIMIT: tl.constexpr):
    """x with -inf outside the LIMIT groups whose BEST (1 or 2) greatest have the greatest sum."""
    x_GM = tl.reshape(x, [x.shape[0] * G2, M2])
    # A row for each token and group: its best, and with BEST == 2 its second best.
    rank = tl.max(x_GM, 1)
    if BEST == 2:
        _, rest = without_best(x_GM, tl.arange(0, M2)[None, :])
        rank += tl.max(rest, 1)
    # Take the best group LIMIT times: those taken are then at -inf.
    rank = tl.reshape(rank, [x.shape[0], G2])
    for _ in tl.static_range(LIMIT):
        _, rank = without_best(rank, tl.arange(0, G2)[None, :])
    taken = tl.reshape(rank, [x.shape[0] * G2])[:, None] == float("-inf")
    return tl.reshape(tl.where(taken, x_GM, float("-inf")), [x.shape[0], G2 * M2])


@triton.jit
def best(x, c, k, K: tl.constexpr):
    """Columns of the K greatest of each row, in falling order [ROWS, K2]; and x with -inf there."""
    columns = tl.zeros([x.shape[0], k.shape[1]], tl.int32)
    for i in tl.static_range(K):
        at, x = without_best(x, c)
        columns = tl.where(k == i, at, columns)
    return columns, x


@triton.jit
def tally(counts, e, before, after, there):
    """Adds to counts[e] how many tokens chose expert e: those whose score was taken between `before` and `after`."""
    n = tl.sum(((before > after) & there).to(tl.int32), 0, keep_dims=True)
    tl.atomic_add(counts + e, n.to(counts.dtype.element_ty), mask=n > 0, sem="relaxed")


@triton.jit
def gate_kernel(logits, bias, weights, experts, chosen, load, tallies, T, scale, G: tl.constexpr, M: tl.constexpr,
                G2: tl.constexpr, M2: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, ROWS: tl.constexpr,
                SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, BALANCED: tl.constexpr, KEEP: tl.constexpr,
                COUNT: tl.constexpr, BEST: tl.constexpr, LIMIT: tl.constexpr):  # fmt: skip
    """KEEP: `chosen` receives the scores of the chosen. COUNT: `load` counts choices. BALANCED: `tallies` int32 [S, E]
    counts which experts have the best scores without bias, for each sequence."""
    # Score all experts of these tokens, and choose K of them by score + bias.
    s, n, there = place(T, ROWS)
    c, e, real = columns(G, M, G2, M2)
    k = tl.arange(0, K2)[None, :]
    x = tl.load(logits + n * (G * M) + e, mask=there & real, other=float("-inf"))
    greatest, total = extent(x)
    scores = score(x, greatest, total, SIGMOID)
    biased = ranked(scores + tl.load(bias + e, mask=real, other=0.0), real)
    if LIMIT < G:
        biased = in_best_groups(biased, G2, M2, BEST, LIMIT)
    at, rest = best(biased, c, k, K)
    # From columns of the tile to numbers of experts.
    at = at // M2 * M + at % M2
    keep = there & (k < K)
    tl.store(experts + n * K + k, at.to(tl.int64), mask=keep)
    if COUNT:
        tally(load, e, biased, rest, there)
    # Weights are made of the plain scores: the chosen logits are read once more, by number.
    s_k = tl.where(keep, score(tl.load(logits + n * (G * M) + at, mask=keep, other=0.0), greatest, total, SIGMOID), 0.0)
    if KEEP:
        tl.store(chosen + n * K + k, s_k, mask=keep)
    if NORMALISE:
        s_k = s_k / (tl.sum(s_k, 1, keep_dims=True) + 1e-20)
    tl.store(weights + n * K + k, s_k * scale, mask=keep)
    # The balance loss counts choices without bias and without groups.
    if BALANCED:
        highest = ranked(scores, real)
        _, rest = best(highest, c, k, K)
        tally(tallies + s * (G * M), e, highest, rest, there)


@triton.jit
def balance_kernel(logits, tallies, terms, T, share, G: tl.constexpr, M: tl.constexpr, G2: tl.constexpr,
                   M2: tl.constexpr, ROWS: tl.constexpr, SIGMOID: tl.constexpr):  # fmt: skip
    """Each token's part of the loss: share * (tallies . s) / (1 . s)."""
    s, n, there = place(T, ROWS)
    _, e, real = columns(G, M, G2, M2)
    x = tl.load(logits + n * (G * M) + e, mask=there & real, other=float("-inf"))
    greatest, total = extent(x)
    scores = score(x, greatest, total, SIGMOID)
    f = tl.load(tallies + s * (G * M) + e, mask=real, other=0).to(tl.float32)
    term = tl.sum(scores * f, 1, keep_dims=True) / tl.sum(scores, 1, keep_dims=True)
    tl.store(terms + n, share * term, mask=there)


@triton.jit
def gate_backward_kernel(dweights, dloss, logits, chosen, experts, tallies, dlogits, T, scale, share, G: tl.constexpr,
                         M: tl.constexpr, G2: tl.constexpr, M2: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
                         ROWS: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, BALANCED: tl.constexpr,
                         KEPT: tl.constexpr, WEIGHED: tl.constexpr):  # fmt: skip
    """KEPT: the scores of the chosen are all there is, and other logits have no gradient. BALANCED, WEIGHED: the loss,
    and the weights, have a gradient."""
    s, n, there = place(T, ROWS)
    _, e, real = columns(G, M, G2, M2)
    k = tl.arange(0, K2)[None, :]
    # Of the scores, and at last of the logits; with KEPT of the logits at once.
    d = tl.zeros([ROWS, G2 * M2], tl.float32)
    greatest, total = tl.zeros([ROWS, 1], tl.float32), tl.full([ROWS, 1], 1.0, tl.float32)
    if not KEPT:
        x = tl.load(logits + n * (G * M) + e, mask=there & real, other=float("-inf"))
        greatest, total = extent(x)
        scores = score(x, greatest, total, SIGMOID)
    if WEIGHED:
        keep = there & (k < K)
        if KEPT:
            s_k = tl.load(chosen + n * K + k, mask=keep, other=0.0)
        else:
            at = tl.load(experts + n * K + k, mask=keep, other=-1)
            s_k = score(tl.load(logits + n * (G * M) + at, mask=at >= 0, other=0.0), greatest, total, SIGMOID)
        # w = scale * s / sum s, so d s = scale / sum s * (d w - sum(d w * s) / sum s); without NORMALISE, scale * d w.
        sum_k = tl.full([ROWS, 1], 1.0, tl.float32)
        mean = tl.zeros([ROWS, 1], tl.float32)
        if NORMALISE:
            s_k = tl.where(keep, s_k, 0.0)
            sum_k = tl.sum(s_k, 1, keep_dims=True) + 1e-20
            mean = tl.sum(tl.load(dweights + n * K + k, mask=keep, other=0.0) * s_k, 1, keep_dims=True) / sum_k
        # Put each choice's gradient into its expert's column.
        for i in tl.static_range(K):
            at = tl.load(experts + n * K + i, mask=there, other=-1)
            d_k = (tl.load(dweights + n * K + i, mask=there, other=0.0) - mean) / sum_k * scale
            if KEPT:
                s_i = tl.load(chosen + n * K + i, mask=there, other=0.0)
                d_k = d_k * s_i * (1.0 - s_i)
            d = tl.where(e == at, d_k, d)
    # d/ds of share * (f . s) / (1 . s)
    if BALANCED:
        f = tl.load(tallies + s * (G * M) + e, mask=real, other=0).to(tl.float32)
        whole = tl.sum(scores, 1, keep_dims=True)
        d += tl.load(dloss) * share * (f - tl.sum(scores * f, 1, keep_dims=True) / whole) / whole
    # From scores to logits.
    if not KEPT:
        d = d * scores * (1.0 - scores) if SIGMOID else scores * (d - tl.sum(d * scores, 1, keep_dims=True))
    tl.store(dlogits + n * (G * M) + e, d, mask=there & real)


def tile(shape: Shape) -> dict[str, int]:
    """Constants of all three kernels: how experts lie in a tile."""
    in_group = shape.routed // shape.groups
    g2, m2 = triton.next_power_of_2(shape.groups), triton.next_power_of_2(in_group)
    return {"G": shape.groups, "M": in_group, "G2": g2, "M2": m2, "ROWS": max(1, min(ROWS, TILE // (g2 * m2)))}


def weighing(shape: Shape) -> dict[str, int | bool]:
    """Constants of forward and backward: how choices are weighed."""
    return {
        "K": shape.top_k,
        "K2": triton.next_power_of_2(shape.top_k),
        "SIGMOID": shape.score == "sigmoid",
        "NORMALISE": shape.normalise,
    }


class _Launch:
    """What the launches of one call have in common. An argument that a kernel does not use may be None."""

    def __init__(self, shape: Shape, tokens: int, sequences: int) -> None:
        self.shape, self.sequences, self.length = shape, sequences, tokens // sequences
        # alpha * mean of (f . s) / (1 . s), f = E / (K T) * tallies, is a sum of share * (tallies . s) / (1 . s)
        self.share = shape.balance_alpha * shape.routed / (shape.top_k * self.length * tokens) if tokens else 0.0

    def __call__(self, kernel: JITFunction, *args: Tensor | float | None, **constants: int) -> None:
        sizes = tile(self.shape)
        if self.length:
            grid = (self.sequences * ceil_div(self.length, sizes["ROWS"]),)
            kernel[grid](*args, **sizes, **constants, num_warps=1)

    def balance_loss(self, logits: Tensor, tallies: Tensor) -> Tensor:
        terms = logits.new_empty(len(logits))
        sigmoid = self.shape.score == "sigmoid"
        self(balance_kernel, logits, tallies, terms, self.length, self.share, SIGMOID=sigmoid)
        return terms.sum()


class _RouteContext(Context, Protocol):
    launch: _Launch

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class _Route(Function):
    @staticmethod
    def forward(
        ctx: _RouteContext, logits_NE: Tensor, bias_E: Tensor, shape: Shape, sequences: int, load_E: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logits, size, sparse = logits_NE.contiguous(), (len(logits_NE), shape.top_k), shape.sparse_gate
        weights, experts = logits.new_empty(size), logits.new_empty(size, dtype=torch.int64)
        chosen = logits.new_empty(size) if sparse else None
        tallies = None
        if shape.balance_alpha:
            tallies = torch.zeros(sequences, shape.routed, dtype=torch.int32, device=logits.device)
        launch = _Launch(shape, len(logits), sequences)
        launch(
            gate_kernel, logits, bias_E, weights, experts, chosen, load_E, tallies, launch.length, shape.route_scale,
            **weighing(shape), BALANCED=tallies is not None, KEEP=sparse, COUNT=load_E is not None,
            BEST=shape.ranked_by, LIMIT=shape.group_limit,
        )  # fmt: skip
        loss = None if tallies is None else launch.balance_loss(logits, tallies)
        ctx.save_for_backward(None if sparse else logits, chosen, experts, tallies)
        ctx.launch = launch
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)
        return weights, experts, loss

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _RouteContext, dweights_NK: Tensor | None, _: None, dloss: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        logits, chosen, experts, tallies = ctx.saved_tensors
        launch, shape = ctx.launch, ctx.launch.shape
        dlogits = torch.empty(len(experts), shape.routed, dtype=torch.float32, device=experts.device)
        launch(
            gate_backward_kernel, None if dweights_NK is None else dweights_NK.contiguous(), dloss, logits, chosen,
            experts, tallies, dlogits, launch.length, shape.route_scale, launch.share, **weighing(shape),
            BALANCED=dloss is not None, KEPT=chosen is not None, WEIGHED=dweights_NK is not None,
        )  # fmt: skip
        return dlogits, None, None, None, None


def route(
    logits_NE: Tensor, bias_E: Tensor, shape: Shape, sequences: int, load_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return _Route.apply(logits_NE, bias_E, shape, sequences, load_E)
