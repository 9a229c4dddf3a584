"""The table, the fake, the rounds, the meter, and DeepEP's adapter on a stand-in for DeepEP."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.config import CommConfig
from dryvine.comm.dispatch.backends import BACKENDS
from dryvine.comm.dispatch.choose import expected_crossings, make_dispatcher, pick
from dryvine.comm.dispatch.deepep import DeepEP, Route, probe
from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.dispatch.rounds import InRounds, imbalance
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.comm.local import run
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.comm.topology import NVLINK_H800, Link, by_sizes
from tests.support.dispatch import draw

CPU, MINUTE = torch.device("cpu"), timedelta(seconds=60)


def every_backend(rank: int, sizes: list[int], dtype: torch.dtype, groups: int = 1) -> dict[str, dict[str, int]]:
    """All that run here, over gloo, against flat: bitwise in dispatch, to rounding in combine. `sizes` are of the nodes
    of one of `groups` expert-parallel groups."""
    mesh = make_mesh(Layout(dp=groups, ep=sum(sizes)), CPU, MINUTE)
    chosen, noise = draw(rank, 30 * rank, 12, 3), torch.Generator().manual_seed(rank)
    rows, weights = torch.randn(30 * rank, 6, generator=noise).to(dtype), torch.rand(30 * rank, 3, generator=noise)
    seen, want = {}, None
    for name in ("flat", "hierarchical"):
        dispatcher: Any = make_dispatcher(name, Setup(12, mesh, by_sizes(sizes * groups)))
        handle = dispatcher.plan_routing(chosen).wait()
        dispatcher.meter.take()
        got = dispatcher.dispatch((rows,), weights, handle).wait()
        seen[name] = dispatcher.meter.take()
        back = dispatcher.combine((got[0].float() * got[1][:, None]).to(dtype), got[1], handle).wait()
        want = want or (got, back)
        assert all(torch.equal(a, b) for a, b in zip(got, want[0], strict=True))
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(back[0], want[1][0], rtol=tolerance, atol=tolerance)
        assert torch.equal(back[1], weights)
    return seen


@pytest.mark.parametrize("sizes", [[2, 2], [2, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_over_gloo(sizes: list[int], dtype: torch.dtype) -> None:
    results = run(every_backend, sum(sizes), sizes, dtype, deadline=60)
    crossed = {name: sum(r[name].get("inter", 0) for r in results) for name in ("flat", "hierarchical")}
    assert 0 < crossed["hierarchical"] < crossed["flat"]


def test_a_group_that_does_not_begin_at_rank_0_has_its_own_hops() -> None:
    run(every_backend, 4, [1, 1], torch.float32, 2, deadline=60)


def routed_alike(rank: int, name: str) -> dict[str, int]:
    mesh = make_mesh(Layout(ep=4), CPU, MINUTE)
    dispatcher: Any = make_dispatcher(name, Setup(8, mesh, by_sizes([2, 2])))
    handle = dispatcher.plan_routing(draw(7, 40, 8, 3)).wait()
    dispatcher.meter.take()
    dispatcher.dispatch((torch.zeros(40, 64),), torch.zeros(40, 3), handle).wait()
    taken: dict[str, int] = dispatcher.meter.take()
    return taken


def test_fake_counts_the_bytes_that_the_real_one_sends() -> None:
    real, fake = run(routed_alike, 4, "hierarchical"), run(routed_alike, 4, "fake")
    assert real == fake
    assert all(taken["inter"] for taken in real)


def test_fake_runs_a_whole_layer_alone() -> None:
    fake: Any = make_dispatcher("fake", Setup(16, topology=by_sizes([4, 4]), alignment=8))
    chosen, rows, weights = draw(0, 20, 16, 4), torch.randn(20, 6), torch.rand(20, 4)
    handle = fake.plan_routing(chosen).wait()
    got, values = fake.dispatch((rows,), weights, handle).wait()
    assert len(handle.counts) == 2
    assert len(got) == sum(handle.counts)
    assert all(count % 8 == 0 for count in handle.counts)
    back, again = fake.combine(got * values[:, None], values, handle).wait()
    torch.testing.assert_close(back, rows * weights.sum(1, keepdim=True))
    assert torch.equal(again, weights)


def test_fake_counts_a_combine_as_its_dispatch() -> None:
    fake: Any = make_dispatcher("fake", Setup(16, topology=by_sizes([4, 4])))
    handle = fake.plan_routing(draw(0, 20, 16, 4)).wait()
    for weights in (torch.rand(20, 4), None):
        fake.meter.take()
        got = fake.dispatch((torch.randn(20, 6),), weights, handle).wait()
        dispatched = fake.meter.take()
        fake.combine(got[0], None if weights is None else got[1], handle).wait()
        assert fake.meter.take() == dispatched
        assert dispatched["inter"]


@pytest.mark.parametrize(("factor", "kind"), [(0.0, SingleRank), (0.5, InRounds), (1.0, InRounds)])
def test_a_limit_of_imbalance_makes_rounds(factor: float, kind: type) -> None:
    assert isinstance(make_dispatcher("flat", Setup(4), factor), kind)


def segments(rows: Tensor, values: Tensor, counts: Sequence[int]) -> list[list[tuple[float, ...]]]:
    """Each expert's rows with their weights, whole, in an order of their own."""
    whole = torch.cat((rows, values[:, None]), dim=1)
    return [sorted(map(tuple, part.tolist())) for part in whole.split(list(counts))]


def skewed(rank: int, factor: float) -> tuple[int, list[int]]:
    """Every token to rank 0's experts: flat as the oracle of the one in rounds."""
    group = dist.group.WORLD
    plain = Flat(GroupExchange(group), 8)
    in_rounds = InRounds(Flat(GroupExchange(group), 8), plain.exchange, 8, factor)
    chosen = draw(rank, 24, 4, 2)
    rows, weights = torch.randn(24, 5), torch.rand(24, 2)
    want, handle = plain.plan_routing(chosen).wait(), in_rounds.plan_routing(chosen).wait()
    assert handle.counts == want.counts
    got, values = in_rounds.dispatch((rows,), weights, handle).wait()
    assert segments(got, values, want.counts) == segments(*plain.dispatch((rows,), weights, want).wait(), want.counts)
    back, again = in_rounds.combine(got * values[:, None], values, handle).wait()
    torch.testing.assert_close(back, rows * weights.sum(1, keepdim=True))
    assert torch.equal(again, weights)
    return len(handle.handles), list(handle.tokens)


@pytest.mark.parametrize(("factor", "rounds"), [(1.5, 2), (0.9, 3), (4.0, 1)])
def test_it_goes_in_rounds_when_all_tokens_go_to_one_rank(factor: float, rounds: int) -> None:
    for seen, tokens in run(skewed, 2, factor):
        assert seen == rounds
        assert sum(tokens) == 24
        assert max(tokens) - min(tokens) <= 1


def test_imbalance_is_the_busiest_over_the_mean() -> None:
    assert imbalance((6, 2, 2, 2)) == 2.0
    assert imbalance((3, 3)) == 1.0
    assert imbalance((0, 0)) == 1.0


def counted(rank: int, name: str, factor: float) -> dict[str, dict[str, int]]:
    """What the caller's meter has seen after each call; every token goes to node 0."""
    mesh = make_mesh(Layout(ep=4), CPU, MINUTE)
    setup = Setup(8, mesh, by_sizes([2, 2]))
    dispatcher = make_dispatcher(name, setup, factor)
    assert dispatcher.meter is setup.meter
    chosen, seen = draw(rank, 24, 4, 2), {}
    handle = dispatcher.plan_routing(chosen).wait()
    seen["routing"] = dispatcher.meter.take()
    (got,) = dispatcher.dispatch((torch.zeros(24, 5),), None, handle).wait()
    seen["dispatch"] = dispatcher.meter.take()
    dispatcher.combine(got, None, handle).wait()
    seen["combine"] = dispatcher.meter.take()
    return seen


@pytest.mark.parametrize("name", ["flat", "hierarchical"])
def test_rounds_count_all_bytes_in_one_meter(name: str) -> None:
    """Rows are the same whatever the rounds; the loads that all ranks tell each other come on top."""
    for plain, rounds in zip(run(counted, 4, name, 0.0), run(counted, 4, name, 1.5), strict=True):
        for link in ("self", "intra", "inter"):
            assert rounds["dispatch"].get(link, 0) == plain["dispatch"].get(link, 0)
            assert rounds["combine"].get(link, 0) == plain["combine"].get(link, 0)
            assert rounds["routing"][link] > plain["routing"][link]
        assert sum(plain["dispatch"].values()) > 0


def rounds_of_the_load(rank: int) -> dict[str, int]:
    setup = Setup(8, make_mesh(Layout(ep=4), CPU, MINUTE), by_sizes([2, 2]))
    make_dispatcher("flat", setup, 100.0).plan_routing(draw(rank, 24, 8, 2)).wait()
    return setup.meter.take()


def test_one_round_costs_one_exchange_of_loads() -> None:
    """Flat's message is 2 experts and a refusal, the load 4 ranks: 7 words to each rank."""
    assert run(rounds_of_the_load, 4) == [{"self": 56, "intra": 56, "inter": 112}] * 4


def test_auto_takes_nvlink_where_it_is_known_to_be_faster() -> None:
    """Two ranks of a node that NVLink joins, whose ops are CUDA graphs."""

    def taken(sizes: list[int], kind: str, graphs: bool) -> str:
        return pick(replace(by_sizes(sizes), intra=Link(kind, 160.0)), 8, 64, graphs)[0]

    assert taken([2], "NVLink", graphs=True) == "nvlink"
    assert "2 ranks joined by NVLink, whose" in pick(replace(by_sizes([2]), intra=NVLINK_H800), 8, 64, True)[1]
    others = ([2], "NVLink", False), ([2], "PCIe", True), ([4], "NVLink", True), ([1], "NVLink", True)
    assert [taken(*other) for other in others] == ["flat"] * 4
    assert taken([1, 1], "NVLink", graphs=True) == "hierarchical"
    assert [taken([2, 2], "NVLink", graphs) for graphs in (True, False)] == ["nvlink"] * 2
    assert [taken(*other) for other in (([2, 2], "PCIe", True), ([4, 4], "NVLink", True))] == ["hierarchical"] * 2
    why = pick(replace(by_sizes([2, 2]), intra=NVLINK_H800), 8, 64)[1]
    assert (
        why == "2 nodes: a token crosses ethernet 1.00 times, with flat 4.00 times; inside nodes it goes by copy engine"
    )


def test_auto_says_why() -> None:
    assert pick(by_sizes([1]), 8, 256)[0] == "flat"
    name, why = pick(by_sizes([8, 8]), 8, 256)
    assert name == "hierarchical"
    assert "2 nodes" in why
    assert "1.00 times, with flat 4.00 times" in why
    assert pick(by_sizes([8]), 8, 256)[0] == "flat"
    crossings = expected_crossings(by_sizes([8] * 8), 8, 256)
    assert crossings.each == 7.0
    assert 4.6 < crossings.once < 4.7  # 7 * (1 - C(224, 8) / C(256, 8))


def test_unknown_dispatcher() -> None:
    for refuse in (lambda: make_dispatcher("flatt", Setup(4)), lambda: CommConfig(dispatcher="flatt")):
        with pytest.raises(ValueError, match="'flatt': no such dispatcher; choose auto or one of flat, hierarchical"):
            refuse()


def test_every_backend_is_a_module_and_a_name_in_the_config() -> None:
    for name, module in BACKENDS.items():
        spec = find_spec(module)
        assert spec is not None
        assert "\ndef build(setup: Setup) -> " in Path(str(spec.origin)).read_text()
        assert CommConfig(dispatcher=name).dispatcher == name
    assert CommConfig().dispatcher == CommConfig(dispatcher="auto").dispatcher == "auto"


class StandIn:
    """DeepEP's semantics for one rank that holds every expert: rows arrive once, in token order."""

    def __init__(self, group: Any, *sizes: Any, **named: Any) -> None:
        self.named = named

    @staticmethod
    def get_dispatch_config(ranks: int) -> Any:
        hint = SimpleNamespace(get_nvl_buffer_size_hint=lambda h, n: h * n, get_rdma_buffer_size_hint=lambda h, n: 0)
        return hint

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, chosen: Tensor, experts: int) -> tuple[Any, ...]:
        return None, None, torch.bincount(chosen.flatten(), minlength=experts), None, None

    def dispatch(self, x: Tensor, handle: Any = None, topk_idx: Tensor | None = None, **more: Any) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16
        assert x.shape[1] * 2 % 512 == 0
        if topk_idx is None:
            return x.clone(), None, None, None, None, None
        experts = more.get("num_experts") or len(more["num_tokens_per_expert"])
        counts = torch.bincount(topk_idx.flatten(), minlength=experts).tolist()
        handle = SimpleNamespace(num_recv_tokens_per_expert_list=counts)
        if "num_experts" in more:
            return x.clone(), topk_idx, None, handle, None
        return x.clone(), topk_idx, None, counts, handle, None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        return x.clone(), topk_weights, None


@pytest.mark.parametrize(("name", "version"), [("Buffer", "V1"), ("ElasticBuffer", "V2"), ("EPBuffer", "V2.5")])
def test_deepep_adapter_matches_flat(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    module = ModuleType("deep_ep")
    setattr(module, name, StandIn)
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    assert probe() == (version, "")
    setup = Setup(8, mesh_of(1), tokens=16, top_k=3, row_bytes=1024, alignment=4)
    adapter = DeepEP(setup)
    flat = Flat(GroupExchange(None), 8, alignment=4)
    chosen, rows, weights = draw(0, 16, 8, 3), torch.randn(16, 12).bfloat16(), torch.rand(16, 3)
    mine, want = adapter.plan_routing(chosen).wait(), flat.plan_routing(chosen).wait()
    assert mine.counts == want.counts
    assert setup.meter.take() == {"self": 16 * 512}  # narrow rows
    got, wanted = adapter.dispatch((rows,), weights, mine).wait(), flat.dispatch((rows,), weights, want).wait()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert setup.meter.take() == {"self": 16 * 512}  # 24 bytes and 12 of weights, in whole vectors of a warp
    back, again = adapter.combine(got[0], got[1], mine).wait()
    assert torch.equal(back, flat.combine(got[0], None, want).wait()[0])
    assert torch.equal(again, weights)
    assert setup.meter.take() == {"self": 16 * (24 + 12)}


def mesh_of(ranks: int) -> Mesh:
    """A mesh whose group only knows its size."""
    group: Any = SimpleNamespace(size=lambda: ranks)
    return Mesh(1, 1, ranks, 0, CPU, group, {})


def crossings(rank: int, sizes: list[int]) -> tuple[dict[str, int], dict[str, int]]:
    """(rows that hierarchical sends, rows that DeepEP's adapter counts) by link, for routing of this rank's own."""
    chosen, world = draw(rank, 40 + rank, 12, 4), sum(sizes)
    setup = Setup(12, make_mesh(Layout(ep=world), CPU, MINUTE), by_sizes(sizes))
    real = make_dispatcher("hierarchical", setup)
    handle = real.plan_routing(chosen).wait()
    setup.meter.take()
    real.dispatch((torch.zeros(len(chosen), 1, dtype=torch.int64),), None, handle).wait()
    route, meter = Route(by_sizes(sizes), rank, 12), Meter()
    meter.add(route.links, route.rows(route.reach(chosen).tolist()), 8)
    return setup.meter.take(), meter.take()


@pytest.mark.parametrize("sizes", [[2, 2], [2, 1], [3]])
def test_deepep_counts_the_links_that_tokens_take(sizes: list[int]) -> None:
    real, ours = zip(*run(crossings, sum(sizes), sizes), strict=True)
    for link in ("self", "intra", "inter"):
        assert sum(r.get(link, 0) for r in real) == sum(o.get(link, 0) for o in ours), link


def test_deepep_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    version, lacking = probe()
    assert version == ""
    assert "deep_ep does not import" in lacking
    with pytest.raises(ValueError, match=r"choose comm\.dispatcher = hierarchical"):
        DeepEP(Setup(8, mesh_of(2), tokens=16, top_k=3, row_bytes=1024))
    monkeypatch.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))
    assert re.search(r"^deep_ep has no .*; choose comm\.dispatcher = hierarchical$", probe()[1])
