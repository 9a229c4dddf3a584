"""Bytes between nodes, read from the kernel: two-hop dispatch sends the proven minimum, and FP8 half of BF16's."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dryvine.comm.dispatch.choose import make_dispatcher
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.topology import by_sizes
from tests.support import netns_bed

TOKENS, HIDDEN, EXPERTS, TOP_K, GROUPS, LIMIT = 96, 2048, 64, 8, 8, 4


def grouped(seed: int, tokens: int) -> torch.Tensor:
    """V3's routing shape: the best 4 of 8 groups, then the best 8 experts in them."""
    score = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))
    best = score.view(tokens, GROUPS, -1).topk(2).values.sum(2).topk(LIMIT).indices
    kept = torch.zeros(tokens, GROUPS).scatter_(1, best, 1).repeat_interleave(EXPERTS // GROUPS, dim=1)
    return (score + kept).topk(TOP_K).indices


def moved(fn: Any) -> int:
    """Bytes that left this node while every rank ran `fn`."""
    dist.barrier()
    before = netns_bed.sent_bytes()
    dist.barrier()
    fn()
    dist.barrier()
    return netns_bed.sent_bytes() - before


def crossing(rank: int, sizes: list[int]) -> dict[str, int]:
    world = sum(sizes)
    mesh = make_mesh(Layout(ep=world), torch.device("cpu"), timedelta(seconds=60))
    chosen = grouped(rank, TOKENS)
    bf16 = (torch.randn(TOKENS, HIDDEN).bfloat16(),)
    fp8 = (torch.zeros(TOKENS, HIDDEN, dtype=torch.uint8), torch.ones(TOKENS, HIDDEN // 128))
    topology = by_sizes(sizes)
    per_node = EXPERTS // world * torch.tensor(sizes).cumsum(0)
    hit = torch.stack([((chosen < end) & (chosen >= end - EXPERTS // len(sizes))).any(1) for end in per_node], dim=1)
    hit[:, topology.node_of(rank)] = False
    seen = {"minimum": int(hit.sum()) * HIDDEN * 2}
    for name in ("flat", "hierarchical"):
        dispatcher: Any = make_dispatcher(name, Setup(EXPERTS, mesh, topology))
        handle = dispatcher.plan_routing(chosen).wait()
        rows: list[torch.Tensor] = []
        seen[f"{name} dispatch"] = moved(
            lambda d=dispatcher, h=handle, r=rows: r.extend(d.dispatch(bf16, None, h).wait())
        )
        seen[f"{name} combine"] = moved(lambda d=dispatcher, h=handle, r=rows: d.combine(r[0], None, h).wait())
        seen[f"{name} fp8"] = moved(lambda d=dispatcher, h=handle: d.dispatch(fp8, None, h).wait())
    return seen


@pytest.mark.parametrize("sizes", [[2, 2], [2, 2, 2, 2]], ids=["2x2", "4x2"])
def test_bytes_between_nodes(sizes: list[int]) -> None:
    if lacking := netns_bed.missing():
        pytest.skip(lacking)
    with netns_bed.nodes(len(sizes)) as names:
        ranks = netns_bed.run(names, sizes, crossing, sizes)
    minimum = sum(rank["minimum"] for rank in ranks)
    firsts = [sum(sizes[:node]) for node in range(len(sizes))]  # one rank per node reads the node's counter
    total = {key: sum(ranks[first][key] for first in firsts) for key in ranks[0] if key != "minimum"}
    for direction in ("dispatch", "combine"):
        assert minimum <= total[f"hierarchical {direction}"] < 1.03 * minimum
        assert total[f"flat {direction}"] > 2 * total[f"hierarchical {direction}"]
    assert total["hierarchical fp8"] < 0.53 * total["hierarchical dispatch"]  # 1 + 4/128 bytes a value against 2
