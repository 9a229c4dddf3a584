"""Any routing over any nodes: hierarchical gives what flat gives, and both what one process gives.

Ranks are threads here and their network a board in memory, so that hypothesis can try hundreds of shapes; the same
dispatchers run over gloo in test_dispatch.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dryvine.comm.topology import by_sizes
from tests.support.dispatch import Boards, cases, check_order, on_ranks, there_and_back


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
