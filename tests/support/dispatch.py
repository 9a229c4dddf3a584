"""Routings, and dispatchers whose ranks are threads and whose network is a board in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.hierarchical import Hierarchical
from dryvine.comm.dispatch.hop_groups import HopGroups, rail_of
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.pending import Pending
from dryvine.comm.topology import Topology


def draw(seed: int, tokens: int, experts: int, top_k: int) -> Tensor:
    """Different experts for each token, int64 [tokens, top_k]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].contiguous()


class Board:
    """Where threads leave rows for each other: one per communicator."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks, self.sent, self.barrier = ranks, {}, threading.Barrier(len(ranks), timeout=30)

    def exchange(self, rank: int, rows: Tensor, sends: Sequence[int]) -> Tensor:
        self.sent[rank] = rows.split(list(sends))
        self.barrier.wait()
        came = torch.cat([self.sent[source][self.ranks.index(rank)] for source in self.ranks])
        self.barrier.wait()
        return came


class ThreadExchange:
    """The Exchange of one thread on one board; checks the split sizes that gloo would trip over."""

    def __init__(self, board: Board, me: int) -> None:
        self.board, self.me, self.size, self.rank = board, me, len(board.ranks), board.ranks.index(me)
        self.sent, self.meter = 0, Meter()

    def start(self, rows: Tensor, sends: Any, receives: Any, into: Tensor | None = None, what: str = "") -> Any:
        assert len(rows) == sum(sends), what
        came = self.board.exchange(self.me, rows, sends)
        assert len(came) == sum(receives), what
        self.sent += sum(n for rank, n in zip(self.board.ranks, sends, strict=True) if rank != self.me)
        return Pending.done(came if into is None else into.copy_(came))


class Boards:
    """All communicators of a topology."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.all = Board(range(topology.ranks))
        self.nodes = {ranks: Board(ranks) for ranks in topology.nodes}
        self.rails = {ranks: Board(ranks) for ranks in topology.rails()}

    def flat(self, rank: int, experts: int, alignment: int) -> Flat:
        return Flat(ThreadExchange(self.all, rank), experts, alignment)

    def hierarchical(
        self, rank: int, experts: int, alignment: int, chunks: int, device: torch.device | None = None
    ) -> Hierarchical:
        node = ThreadExchange(self.nodes[self.topology.nodes[self.topology.node_of(rank)]], rank)
        rail = ThreadExchange(self.rails[rail_of(self.topology, rank)], rank)
        groups = HopGroups(self.topology, rank, ThreadExchange(self.all, rank), node, rail)
        return Hierarchical(groups, experts, device, chunks, alignment)


def on_ranks(ranks: int, fn: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(fn, range(ranks)))


@st.composite
def cases(draw: Any) -> tuple[list[int], int, int, list[Tensor], int, int]:
    sizes = draw(
        st.sampled_from([[1], [1, 1], [2, 2], [4], [3, 3], [2, 2, 2], [3, 2], [1, 3], [2, 1, 3], [4, 4, 4, 4]])
    )
    ranks = sum(sizes)
    experts = ranks * draw(st.integers(1, 4))
    top_k = draw(st.integers(1, min(8, experts)))
    skew = draw(st.sampled_from(["any", "one expert", "one node", "far"]))
    chosen = []
    for rank in range(ranks):
        tokens = draw(st.sampled_from([0, 1, 3, 17]))
        score = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
        if skew == "one expert":
            score[:, 0] += 1
        if skew == "one node":
            score[:, : experts // len(sizes)] += 1
        if skew == "far":
            score[:, (rank * experts // ranks + experts // 2) % experts] += 1
        chosen.append(score.argsort(dim=1, descending=True)[:, :top_k].contiguous())
    return sizes, experts, top_k, chosen, draw(st.sampled_from([1, 4])), draw(st.sampled_from([1, 3]))


def there_and_back(
    dispatcher: AnyDispatcher, chosen: Tensor, rows: Tensor, weights: Tensor, grads: Tensor
) -> tuple[Any, list[Tensor], Tensor]:
    """Dispatch, weigh, combine, then both backwards: all that a layer does with one handle."""
    handle = dispatcher.plan_routing(chosen).wait()
    got, pairs = dispatcher.dispatch((rows,), weights, handle).wait()
    (back,) = dispatcher.combine(got * pairs[:, None], None, handle).wait()
    (grad_out,) = dispatcher.dispatch((grads,), None, handle).wait()
    grad_rows, grad_weights = dispatcher.combine(grad_out * pairs[:, None], (grad_out * got).sum(1), handle).wait()
    return handle, [got, pairs, grad_out], torch.stack((back, grad_rows)), grad_weights


def check_order(result: Any, rank: int, share: int, chosen: list[Tensor], rows: list[Tensor]) -> None:
    """By local expert, then source rank, then token; padding is zero."""
    begin = 0
    for expert, count in zip(range(rank * share, (rank + 1) * share), result[0].counts, strict=True):
        want = torch.cat([r[(c == expert).any(1)] for r, c in zip(rows, chosen, strict=True)])
        got = result[1][0][begin : begin + count]
        assert torch.equal(got[: len(want)], want)
        assert not got[len(want) :].any()
        begin += count
    assert begin == len(result[1][0])
