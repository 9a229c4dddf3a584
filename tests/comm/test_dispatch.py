"""Every dispatcher against a single-process reference: forward, backward, any shape of routing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.local import RankFailed, run
from tests.support.dispatch import draw


def reference(
    rows: list[Tensor], weights: list[Tensor], chosen: list[Tensor], mine: range
) -> tuple[list[Tensor], list[int]]:
    """What the rank with experts `mine` should get: rows and weights by expert, then source rank, then token."""
    picks = [(w, t, k) for x in mine for w, c in enumerate(chosen) for t, k in (c == x).nonzero().tolist()]
    counts = [sum(int((c == x).sum()) for c in chosen) for x in mine]
    got = [torch.stack([rows[w][t] for w, t, _ in picks]) if picks else rows[0][:0]]
    return [*got, torch.tensor([weights[w][t, k] for w, t, k in picks], dtype=weights[0].dtype)], counts


def flat_rank(rank: int, world: int, experts: int, top_k: int, tokens: list[int], dtype: torch.dtype) -> None:
    group = torch.distributed.group.WORLD if world > 1 else None
    dispatcher = Flat(GroupExchange(group), experts)
    chosen = [draw(w, t, experts, top_k) for w, t in enumerate(tokens)]
    rows = [torch.randn(t, 6, generator=torch.Generator().manual_seed(w)).to(dtype) for w, t in enumerate(tokens)]
    weights = [torch.rand(t, top_k, generator=torch.Generator().manual_seed(w)) for w, t in enumerate(tokens)]
    share = experts // world
    want, counts = reference(rows, weights, chosen, range(rank * share, (rank + 1) * share))

    handle = dispatcher.plan_routing(chosen[rank]).wait()
    got = dispatcher.dispatch((rows[rank],), weights[rank], handle).wait()
    assert list(handle.counts) == counts
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)

    scaled = (got[0].float() * got[1][:, None]).to(dtype)
    back, pairs = dispatcher.combine(scaled, got[1], handle).wait()
    sums = torch.zeros(tokens[rank], 6)
    for k in range(top_k):
        sums += (rows[rank].float() * weights[rank][:, k, None]).to(dtype).float()
    assert back.dtype == dtype
    assert torch.equal(back, sums.to(dtype))
    assert torch.equal(pairs, weights[rank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world", "experts", "top_k", "tokens"),
    [(1, 4, 2, [5]), (1, 4, 2, [0]), (2, 8, 3, [7, 4]), (4, 8, 8, [3, 0, 5, 1]), (3, 6, 1, [0, 0, 0])],
)
def test_flat_gives_the_reference(world: int, experts: int, top_k: int, tokens: list[int], dtype: torch.dtype) -> None:
    if world == 1:
        flat_rank(0, world, experts, top_k, tokens, dtype)
    else:
        run(flat_rank, world, world, experts, top_k, tokens, dtype, deadline=60)


def fp8_rank(rank: int) -> None:
    dispatcher = Flat(GroupExchange(torch.distributed.group.WORLD), 4)
    values = (torch.arange(40).reshape(5, 8) + rank).float().to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.full((5, 3), 2.0**rank)
    handle = dispatcher.plan_routing(draw(rank, 5, 4, 4)).wait()
    got_values, got_scales = dispatcher.dispatch((values, scales), None, handle).wait()
    assert got_values.view(torch.float8_e4m3fn).shape == (20, 8)
    for source in range(2):
        rows = got_scales[:, 0] == 2.0**source
        expected = (torch.arange(40).reshape(5, 8) + source).float().to(torch.float8_e4m3fn).float()
        assert torch.equal(got_values[rows].view(torch.float8_e4m3fn).float(), expected.repeat(2, 1))


def test_fp8_rows_travel_with_their_scales() -> None:
    run(fp8_rank, 2, deadline=60)


def twice_rank(rank: int) -> None:
    chosen = draw(rank, 3, 4, 2)
    if rank == 1:
        chosen[2] = 3
    Flat(GroupExchange(torch.distributed.group.WORLD), 4).plan_routing(chosen).wait()


def test_an_expert_chosen_twice_is_refused_and_the_rank_named() -> None:
    with pytest.raises(RankFailed, match="expert-parallel rank 1: a token chose the same expert twice"):
        run(twice_rank, 2, deadline=60)


def test_experts_that_do_not_divide_are_refused() -> None:
    assert Flat(GroupExchange(None), 3).experts == 3
    with pytest.raises(RankFailed, match="experts = 3 do not divide over 2"):
        run(odd_rank, 2, deadline=60)


def odd_rank(rank: int) -> None:
    Flat(GroupExchange(torch.distributed.group.WORLD), 3)
