"""Any routing over any nodes: hierarchical gives what flat gives, and both what one process gives.

Ranks are threads here and their network a board in memory, so that hypothesis can try hundreds of shapes; the same
dispatchers run over gloo in test_comm_dispatch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.hierarchical import Hierarchical
from dryvine.comm.dispatch.hop_groups import HopGroups, rail_of
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.pending import Pending
from dryvine.comm.topology import Topology, by_sizes


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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_hierarchical_is_flat_is_one_process(case: tuple[list[int], int, int, list[Tensor], int, int]) -> None:
    sizes, experts, top_k, chosen, alignment, chunks = case
    boards = Boards(by_sizes(sizes))
    noise = torch.Generator().manual_seed(0)
    rows = [torch.randn(len(c), 5, generator=noise) for c in chosen]
    grads = [torch.randn(len(c), 5, generator=noise) for c in chosen]
    weights = [torch.rand(len(c), top_k, generator=noise) for c in chosen]

    def both(rank: int) -> Any:
        given_rows = chosen[rank], rows[rank], weights[rank], grads[rank]
        flat = there_and_back(boards.flat(rank, experts, alignment), *given_rows)
        two_hop = there_and_back(boards.hierarchical(rank, experts, alignment, chunks), *given_rows)
        return flat, two_hop

    for rank, (flat, two_hop) in enumerate(on_ranks(sum(sizes), both)):
        assert flat[0].counts == two_hop[0].counts
        for a, b in zip(flat[1], two_hop[1], strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(two_hop[2], flat[2], rtol=1e-6, atol=1e-6)
        assert torch.equal(two_hop[3], flat[3])
        one_process = torch.stack(
            (rows[rank] * weights[rank].sum(1, keepdim=True), grads[rank] * weights[rank].sum(1, keepdim=True))
        )
        torch.testing.assert_close(flat[2], one_process, rtol=1e-5, atol=1e-5)
        dots = (grads[rank] * rows[rank]).sum(1, keepdim=True).expand(-1, top_k)
        torch.testing.assert_close(flat[3], dots, rtol=1e-5, atol=1e-5)
        check_order(flat, rank, experts // sum(sizes), chosen, rows)


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


def test_each_token_crosses_once_per_node() -> None:
    boards = Boards(by_sizes([2, 2, 2]))
    chosen = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(i))[:8] for i in range(40)])

    def rows_sent(rank: int) -> tuple[int, int]:
        dispatcher = boards.hierarchical(rank, 24, 1, 4)
        handle = dispatcher.plan_routing(chosen).wait()
        before = dispatcher.inter.sent, dispatcher.intra.sent
        dispatcher.dispatch((torch.zeros(40, 5),), None, handle).wait()
        return dispatcher.inter.sent - before[0], dispatcher.intra.sent - before[1]

    nodes_hit = torch.stack([(chosen // 8 == node).any(1) for node in range(3)])
    ranks_hit = torch.stack([(chosen // 4 == r).any(1) for r in range(6)])
    sent = on_ranks(6, rows_sent)
    for rank in range(6):
        assert sent[rank][0] == int(nodes_hit.sum() - nodes_hit[rank // 2].sum())
    # Within a node a row goes once to each rank that needs it, but for the half of them where its rail ends.
    assert sum(s[1] for s in sent) == 3 * int(ranks_hit.sum())


@pytest.mark.parametrize("name", ["flat", "hierarchical"])
def test_an_expert_chosen_twice_is_refused_on_every_rank(name: str) -> None:
    boards = Boards(by_sizes([2, 2]))

    def lay(rank: int) -> str:
        extra = () if name == "flat" else (2,)
        dispatcher = getattr(boards, name)(rank, 8, 1, *extra)
        chosen = torch.tensor([[1, 2], [5, 5 if rank == 2 else 6]])
        with pytest.raises(ValueError, match="the same expert twice") as error:
            dispatcher.plan_routing(chosen).wait()
        return str(error.value)

    assert all("expert-parallel rank 2" in message for message in on_ranks(4, lay))
