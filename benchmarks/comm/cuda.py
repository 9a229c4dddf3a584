"""Dispatch on one GPU: that nothing but the layout stops the host, and what the permutations cost.

    python -m benchmarks.comm.cuda        # needs one CUDA device; ranks are threads on it, their network a board

Two nodes of two ranks run the real plans, streams and kernels; rows change hands in device memory instead of on a wire.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.hierarchical import Hierarchical
from dryvine.comm.dispatch.hop_groups import HopGroups
from dryvine.comm.dispatch.routing import Sum
from dryvine.comm.topology import by_sizes
from tests.support.dispatch import Board, Boards, on_ranks

GPU = torch.device("cuda")


class SyncedBoard(Board):
    """Rows that another thread's stream has written are there before they are read."""

    def exchange(self, rank: int, rows: torch.Tensor, sends: Any) -> torch.Tensor:
        torch.cuda.synchronize()
        came = super().exchange(rank, rows, sends)
        torch.cuda.synchronize()
        return came


def same_as_flat(sizes: list[int]) -> None:
    boards = Boards(by_sizes(sizes))
    for board in (boards.all, *boards.nodes.values(), *boards.rails.values()):
        board.__class__ = SyncedBoard

    def both(rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        chosen = torch.rand(200 + rank, 24, generator=generator).topk(4).indices.to(GPU)
        x, w = (
            torch.randn(200 + rank, 64, generator=generator).to(GPU),
            torch.rand(200 + rank, 4, generator=generator).to(GPU),
        )
        flat, two_hop = boards.flat(rank, 24, 8), boards.hierarchical(rank, 24, 8, 3, GPU)
        a, b = flat.plan_routing(chosen).wait(), two_hop.plan_routing(chosen).wait()
        fa, fb = flat.dispatch((x,), w, a).wait(), two_hop.dispatch((x,), w, b).wait()
        assert all(torch.equal(p, q) for p, q in zip(fa, fb, strict=True))
        ca, cb = flat.combine(fa[0], fa[1], a).wait(), two_hop.combine(fb[0], fb[1], b).wait()
        torch.testing.assert_close(ca[0], cb[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(ca[1], cb[1])
        again = two_hop.combine(fb[0], fb[1], b).wait()
        assert torch.equal(cb[0], again[0]), "combine is not deterministic"

    on_ranks(sum(sizes), both)
    print(f"{sizes}: hierarchical equals flat on the GPU, and twice the same bits")


def alone(experts: int) -> dict[str, Any]:
    one = GroupExchange(None)
    groups = HopGroups(by_sizes([1]), 0, one, one, one)
    return {"flat": Flat(one, experts), "hierarchical": Hierarchical(groups, experts, GPU)}


def sums_are_exact() -> None:
    """BF16 rows summed by the device are FP32 sums in order, rounded once to nearest even."""
    rows, source = torch.randn(4000, 512, device=GPU).bfloat16(), torch.randperm(4000, device=GPU)
    begin = torch.arange(0, 4001, 8, device=GPU)
    want = torch.zeros(500, 512, device=GPU)
    for k in range(8):
        want += rows[source[k::8]].float()
    assert torch.equal(Sum(source, begin, 8)(rows), want.bfloat16())
    print("BF16 sums are FP32 sums rounded once")


def host_stops(fn: Callable[[], Any]) -> int:
    """How often torch says that the host waited for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        fn()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchroniz" in str(w.message) for w in seen)


def milliseconds(fn: Callable[[], Any], rounds: int = 20) -> float:
    fn()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(rounds):
        fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / rounds


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    for sizes in ([2, 2], [3, 1], [2, 2, 2]):
        same_as_flat(sizes)
    sums_are_exact()
    tokens, hidden, top_k, experts = 4096, 7168, 8, 64
    chosen = torch.rand(tokens, experts, device=GPU).topk(top_k).indices
    x, w = torch.randn(tokens, hidden, device=GPU, dtype=torch.bfloat16), torch.rand(tokens, top_k, device=GPU)
    for name, dispatcher in alone(experts).items():
        handle = dispatcher.plan_routing(chosen).wait()
        rows, pairs = dispatcher.dispatch((x,), w, handle).wait()
        runs: dict[str, Callable[[], Any]] = {
            "routing": lambda d=dispatcher: d.plan_routing(chosen).wait(),
            "dispatch": lambda d=dispatcher, h=handle: d.dispatch((x,), w, h).wait(),
            "combine": lambda d=dispatcher, h=handle, r=rows, p=pairs: d.combine(r, p, h).wait(),
        }
        for part, fn in runs.items():
            print(f"{name:<13} {part:<9} host stops {host_stops(fn)}   {milliseconds(fn):7.3f} ms")
    print(
        f"a copy of what dispatch gives takes {milliseconds(lambda: rows.clone()):.3f} ms ({rows.nbytes / 1e6:.0f} MB)"
    )


if __name__ == "__main__":
    main()
