"""Comm's kernels where they run: on a GPU they give the bits of the definitions on a CPU. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.dispatch.fake import Fake
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.hierarchical import Hierarchical
from dryvine.comm.dispatch.hop_groups import HopGroups
from dryvine.comm.dispatch.routing import Arrival, Sum
from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.comm.topology import by_sizes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
EXPERTS, TOP_K = 256, 8


def draw(tokens: int, experts: int = EXPERTS) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, experts, generator=generator).topk(TOP_K).indices


def flat(device: str) -> Any:
    return Flat(GroupExchange(None), EXPERTS, alignment=16)


def alone(device: str) -> Any:
    return SingleRank(EXPERTS, alignment=16)


def fake(device: str) -> Any:
    return Fake(by_sizes([8, 8]), 3, EXPERTS, alignment=16)


def hierarchical(device: str) -> Any:
    one = GroupExchange(None)
    return Hierarchical(HopGroups(by_sizes([1]), 0, one, one, one), EXPERTS, torch.device(device), alignment=16)


def journey(make: Callable[[str], Any], device: str, tokens: int, hidden: int) -> list[Any]:
    """All that a layer does with one handle: FP8 and BF16 payloads, with weights and without."""
    dispatcher, noise = make(device), torch.Generator().manual_seed(1)
    chosen, weights = draw(tokens).to(device), torch.rand(tokens, TOP_K, generator=noise).to(device)
    rows = torch.randn(tokens, hidden, generator=noise).bfloat16().to(device)
    values, scales = (torch.randint(0, 255, (tokens, n), dtype=torch.uint8, generator=noise).to(device)
                      for n in (hidden, hidden // 128))  # fmt: skip
    handle = dispatcher.plan_routing(chosen, "layers.0").wait()
    sent = dispatcher.dispatch((values, scales), weights, handle).wait()
    plain, with_it = dispatcher.dispatch((rows,), weights, handle).wait()
    (back,) = dispatcher.combine(plain, None, handle).wait()
    (again,) = dispatcher.dispatch((rows,), None, handle).wait()
    both = dispatcher.combine(again * with_it.bfloat16()[:, None], with_it, handle).wait()
    return [handle.counts, *(t.cpu() for t in (*sent, plain, with_it, back, again, *both))]


@pytest.mark.parametrize("make", [flat, alone, fake, hierarchical])
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 256), (1, 256), (333, 7168)])
def test_a_layers_journey_has_the_bits_of_the_cpu(make: Callable[[str], Any], tokens: int, hidden: int) -> None:
    for ours, defined in zip(*(journey(make, d, tokens, hidden) for d in ("cuda", "cpu")), strict=True):
        assert torch.equal(ours, defined) if isinstance(ours, Tensor) else ours == defined


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [0, 4, 8])
def test_sums_of_ragged_rows(dtype: torch.dtype, apart: int) -> None:
    """Rows of a wire lie apart, and may be aligned to 8 bytes only."""
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(9000, 7168 + apart, generator=generator).to(dtype)
    lengths = torch.randint(0, 9, (2000,), generator=generator)
    begin = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    source = torch.randint(0, 9000, (int(begin[-1]),), generator=generator)
    defined = Sum(source, begin, 8)(wide[:, :7168])
    assert torch.equal(Sum(source.cuda(), begin.cuda(), 8)(wide.cuda()[:, :7168]).cpu(), defined)


@pytest.mark.parametrize(("tokens", "ranks"), [(4096, 64), (0, 4), (1, 256), (16384, 1)])
def test_order_and_arrival(tokens: int, ranks: int) -> None:
    chosen = draw(tokens)
    ours, defined = routing.by_expert(chosen.cuda(), ranks, EXPERTS), routing.by_expert(chosen, ranks, EXPERTS)
    for name, tensor in vars(defined).items():
        assert torch.equal(getattr(ours, name).cpu(), tensor), name
    came, theirs = Arrival.of(ours.message, defined.message, 128), Arrival.of(defined.message, defined.message, 128)
    assert came.counts == theirs.counts
    assert torch.equal(came.order.cpu(), theirs.order)
    assert torch.equal(came.back.cpu(), theirs.back)


def test_an_expert_chosen_twice_is_refused() -> None:
    chosen = draw(500)
    chosen[321, 7] = chosen[321, 0]
    with pytest.raises(ValueError, match="the same expert twice"):
        Flat(GroupExchange(None), EXPERTS).plan_routing(chosen.cuda()).wait()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # is a prototype, says torch 2.11
@pytest.mark.parametrize("make", [flat, alone, fake, hierarchical])
def test_nothing_but_plan_routing_stops_the_host(make: Callable[[str], Any]) -> None:
    dispatcher, chosen = make("cuda"), draw(512).cuda()
    rows, weights = torch.randn(512, 256, device="cuda").bfloat16(), torch.rand(512, TOP_K, device="cuda")
    handle = dispatcher.plan_routing(chosen).wait()

    def there_and_back() -> None:
        got, pairs = dispatcher.dispatch((rows,), weights, handle).wait()
        dispatcher.combine(got, pairs, handle).wait()

    there_and_back()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        there_and_back()
    finally:
        torch.cuda.set_sync_debug_mode("default")
