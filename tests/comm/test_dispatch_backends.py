"""The table, the fake, the guard, the load report, and DeepEP's adapter on a stand-in for DeepEP."""

from __future__ import annotations

import sys
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.config import CommConfig
from dryvine.comm.dispatch.backends import DISPATCHERS, expected_rows, make_dispatcher, pick
from dryvine.comm.dispatch.deepep import DeepEP, probe
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.load import InRounds, Load, Metered, imbalance
from dryvine.comm.local import run
from dryvine.comm.mesh import make_mesh
from dryvine.comm.topology import by_sizes

CPU, MINUTE = torch.device("cpu"), timedelta(seconds=60)


def draw(seed: int, tokens: int, experts: int, top_k: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].contiguous()


def every_backend(rank: int, sizes: list[int], dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """All that run here, over gloo, against flat: bitwise in dispatch, to rounding in combine."""
    world = sum(sizes)
    mesh = make_mesh(1, 1, world, 1, CPU, MINUTE)
    chosen, noise = draw(rank, 30 * rank, 12, 3), torch.Generator().manual_seed(rank)
    rows, weights = torch.randn(30 * rank, 6, generator=noise).to(dtype), torch.rand(30 * rank, 3, generator=noise)
    seen, want = {}, None
    for name in ("flat", "hierarchical"):
        dispatcher: Any = make_dispatcher(name, mesh, 12, by_sizes(sizes))
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


def routed_alike(rank: int, name: str) -> dict[str, int]:
    mesh = make_mesh(1, 1, 4, 1, CPU, MINUTE)
    dispatcher: Any = make_dispatcher(name, mesh, 8, by_sizes([2, 2]))
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
    fake: Any = make_dispatcher("fake", None, 16, by_sizes([4, 4]), alignment=8)
    chosen, rows, weights = draw(0, 20, 16, 4), torch.randn(20, 6), torch.rand(20, 4)
    handle = fake.plan_routing(chosen).wait()
    got, values = fake.dispatch((rows,), weights, handle).wait()
    assert len(handle.counts) == 2
    assert len(got) == sum(handle.counts)
    assert all(count % 8 == 0 for count in handle.counts)
    back, again = fake.combine(got * values[:, None], values, handle).wait()
    torch.testing.assert_close(back, rows * weights.sum(1, keepdim=True))
    assert torch.equal(again, weights)


def skewed(rank: int, factor: float) -> tuple[int, list[int]]:
    """Every token to rank 0's experts: flat as the oracle of the guarded one."""
    group = dist.group.WORLD
    plain = Flat(group, 8)
    guarded = InRounds(Flat(group, 8), plain.exchange, 8, factor)
    chosen = draw(rank, 24, 4, 2)
    rows, weights = torch.randn(24, 5), torch.rand(24, 2)
    want, handle = plain.plan_routing(chosen).wait(), guarded.plan_routing(chosen).wait()
    assert handle.counts == want.counts
    (got, values), (wanted, _) = (d.dispatch((rows,), weights, h).wait() for d, h in ((guarded, handle), (plain, want)))
    assert torch.equal(got.sort(dim=0).values, wanted.sort(dim=0).values)
    back, again = guarded.combine(got * values[:, None], values, handle).wait()
    torch.testing.assert_close(back, rows * weights.sum(1, keepdim=True))
    assert torch.equal(again, weights)
    return len(handle.handles), list(handle.bounds)


@pytest.mark.parametrize(("factor", "rounds"), [(1.5, 2), (0.9, 3), (4.0, 1)])
def test_guard_goes_in_rounds_when_all_tokens_go_to_one_rank(factor: float, rounds: int) -> None:
    for seen, bounds in run(skewed, 2, factor):
        assert seen == rounds
        assert sum(bounds) == 24


def test_load_report() -> None:
    dispatcher = Metered(Flat(None, 4))
    for microbatch in range(2):
        handle = dispatcher.plan_routing(torch.tensor([[0, 1], [0, 2]]), f"layers.3, microbatch {microbatch}").wait()
        dispatcher.dispatch((torch.zeros(2, 4),), None, handle).wait()
    share = dispatcher.take()
    assert share.rows == {"layers.3": (4, 2, 2, 0)}
    load = Load.of([share, share])
    assert load.experts == (4, 2, 2, 0) * 2
    assert load.ranks == (8, 8)
    assert (load.expert_imbalance, load.rank_imbalance) == (2.0, 1.0)
    assert dispatcher.take().rows == {}
    assert imbalance((0, 0)) == 1.0


def test_auto_says_why() -> None:
    assert pick(by_sizes([1]), 8, 256)[0] == "flat"
    name, why = pick(by_sizes([8, 8]), 8, 256)
    assert name == "hierarchical"
    assert "2 nodes" in why
    assert "1.00 times, with flat 4.00 times" in why
    assert pick(by_sizes([8]), 8, 256)[0] == "flat"
    crossings = expected_rows(by_sizes([8] * 8), 8, 256)
    assert crossings.each == 7.0
    assert 4.6 < crossings.once < 4.7  # 7 * (1 - C(224, 8) / C(256, 8))


def test_unknown_dispatcher() -> None:
    with pytest.raises(ValueError, match="'flatt': no such dispatcher; choose auto or one of flat, hierarchical"):
        make_dispatcher("flatt", None, 4)
    assert {"auto", *DISPATCHERS} == set(get_args(CommConfig.model_fields["dispatcher"].annotation))


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
    group: Any = SimpleNamespace(size=lambda: 1)
    adapter = DeepEP(group, 8, tokens=16, top_k=3, hidden_bytes=1024, alignment=4)
    flat = Flat(None, 8, alignment=4)
    chosen, rows, weights = draw(0, 16, 8, 3), torch.randn(16, 12).bfloat16(), torch.rand(16, 3)
    mine, want = adapter.plan_routing(chosen).wait(), flat.plan_routing(chosen).wait()
    assert mine.counts == want.counts
    got, wanted = adapter.dispatch((rows,), weights, mine).wait(), flat.dispatch((rows,), weights, want).wait()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    back, again = adapter.combine(got[0], got[1], mine).wait()
    assert torch.equal(back, flat.combine(got[0], None, want).wait()[0])
    assert torch.equal(again, weights)


def test_deepep_says_what_it_lacks() -> None:
    version, lacking = probe()
    assert version == ""
    assert "deep_ep does not import" in lacking
    group: Any = SimpleNamespace(size=lambda: 2)
    with pytest.raises(ValueError, match=r"choose comm\.dispatcher = hierarchical"):
        DeepEP(group, 8, tokens=16, top_k=3, hidden_bytes=1024)
