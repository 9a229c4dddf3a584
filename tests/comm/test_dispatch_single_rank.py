"""A group of one rank has, without an exchange, the bits and the counted bytes that flat has with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dryvine.comm.dispatch.choose import make_dispatcher
from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.rounds import InRounds
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.dispatch.single_rank import SingleRank
from tests.support.dispatch import draw

EXPERTS, TOP_K, HIDDEN = 12, 3, 24


def journey(dispatcher: Any, tokens: int, dtype: torch.dtype) -> list[Any]:
    """All that a layer does with one handle, FP8 rows included, and what was counted after each step."""
    noise, seen = torch.Generator().manual_seed(1), []

    def note(*results: Any) -> None:
        seen.extend([*results, dispatcher.meter.take()])

    rows = torch.randn(tokens, HIDDEN, generator=noise).to(dtype)
    weights = torch.rand(tokens, TOP_K, generator=noise)
    octets, scales = (torch.randint(0, 255, (tokens, n), dtype=torch.uint8, generator=noise) for n in (HIDDEN, 3))
    handle = dispatcher.plan_routing(draw(0, tokens, EXPERTS, TOP_K), "layers.0").wait()
    note(handle.counts)
    note(*dispatcher.dispatch((octets.view(torch.float8_e4m3fn), scales), weights, handle).wait())
    plain, got = dispatcher.dispatch((rows,), weights, handle).wait()
    note(plain, got)
    (again,) = dispatcher.dispatch((rows * 2,), None, handle).wait()
    note(again)
    # Experts of different sizes: else the order in which a token's rows are added would not show.
    out = again * torch.logspace(-3, 3, len(again)).to(dtype)[:, None]
    note(*dispatcher.combine(out, None, handle).wait())
    note(*dispatcher.combine(plain * got[:, None].to(dtype), got, handle).wait())
    return seen


def same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_alone_is_flat(tokens: int, alignment: int, dtype: torch.dtype) -> None:
    ours = journey(SingleRank(EXPERTS, alignment), tokens, dtype)
    defined = journey(Flat(GroupExchange(None), EXPERTS, alignment), tokens, dtype)
    assert [i for i, (a, b) in enumerate(zip(ours, defined, strict=True)) if not same(a, b)] == []


@pytest.mark.parametrize("name", ["auto", "flat"])
def test_the_table_takes_it_for_one_rank(name: str) -> None:
    assert isinstance(make_dispatcher(name, Setup(EXPERTS)), SingleRank)
    in_rounds = make_dispatcher(name, Setup(EXPERTS), imbalance=1.5)
    assert isinstance(in_rounds, InRounds)
    (counts, sent), (plain_counts, plain_sent) = (
        journey(d, 9, torch.float32)[:2] for d in (in_rounds, SingleRank(EXPERTS))
    )
    assert counts == plain_counts
    assert sent == {"self": plain_sent["self"] + 8}  # the load, which the rank tells itself


def test_an_expert_chosen_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 0: a token chose the same expert twice"):
        SingleRank(4).plan_routing(torch.tensor([[0, 1], [2, 2]])).wait()
