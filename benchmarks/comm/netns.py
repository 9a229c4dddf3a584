"""Two-hop dispatch between real nodes: bytes from the kernel's counters, times as ratios in one run.

    sudo .venv/bin/python -m benchmarks.comm.netns               # 2 nodes x 2 and 4 x 2, 200 Mbit/s between nodes
    sudo .venv/bin/python -m benchmarks.comm.netns --torchrun    # the same, started by torchrun --nnodes

Nodes are network namespaces (tests/support/netns_bed.py). `plain` is one all_to_all_single there and one back of the
bytes that hierarchical moves between nodes, and nothing else: no permutation, no sums, no second hop. The three are
timed in turn, round by round, so that whatever else the machine does falls on all of them; the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dryvine.comm.dispatch.choose import make_dispatcher
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.topology import Topology, by_sizes
from tests.support import netns_bed

EXPERTS, TOP_K, GROUPS, LIMIT = 64, 8, 8, 4


def grouped(seed: int, tokens: int) -> torch.Tensor:
    """V3's routing shape: 4 of 8 groups by the sum of their two best scores, then the best 8 experts in them."""
    score = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))
    best = score.view(tokens, GROUPS, -1).topk(2).values.sum(2).topk(LIMIT).indices
    kept = torch.zeros(tokens, GROUPS).scatter_(1, best, 1).repeat_interleave(EXPERTS // GROUPS, dim=1)
    return (score + kept).topk(TOP_K).indices


def timed(fn: Callable[[], Any]) -> tuple[float, int]:
    """Seconds until every rank is done, and bytes that left this node meanwhile."""
    dist.barrier()
    before = netns_bed.sent_bytes()
    dist.barrier()  # nobody starts before everybody has read
    start = time.perf_counter()
    fn()
    dist.barrier()
    return time.perf_counter() - start, netns_bed.sent_bytes() - before


def plain(handle: Any, row_bytes: int) -> Callable[[], None]:
    """There and back, hierarchical's rows between nodes over a group of its own."""
    group, size = dist.new_group(), dist.get_world_size()
    sends, receives = [0] * size, [0] * size
    rail = handle["rail"]
    for leg in handle["hop1"]:
        for place, rank in enumerate(rail):
            sends[rank] += leg.sends[place]
            receives[rank] += leg.receives[place]
    out = torch.zeros(sum(sends), row_bytes // 8, dtype=torch.int64)
    back = torch.zeros(sum(receives), row_bytes // 8, dtype=torch.int64)

    def there_and_back() -> None:
        dist.all_to_all_single(back, out, receives, sends, group=group)
        dist.all_to_all_single(out, back, sends, receives, group=group)

    return there_and_back


def measure(rank: int, sizes: list[int], tokens: int, hidden: int, rounds: int) -> dict[str, Any]:
    topology = by_sizes(sizes)
    mesh = make_mesh(Layout(ep=sum(sizes)), torch.device("cpu"), timedelta(seconds=600))
    chosen, x = grouped(rank, tokens), torch.randn(tokens, hidden).bfloat16()
    weights = torch.rand(tokens, TOP_K)
    runs: dict[str, Callable[[], Any]] = {}
    parts: dict[str, Any] = {}
    for name in ("flat", "hierarchical"):
        dispatcher: Any = make_dispatcher(name, Setup(EXPERTS, mesh, topology))
        handle = dispatcher.plan_routing(chosen).wait()
        rows, _ = dispatcher.dispatch((x,), weights, handle).wait()

        def there_and_back(d: Any = dispatcher, h: Any = handle, r: Any = rows) -> None:
            d.dispatch((x,), weights, h).wait()
            d.combine(r, None, h).wait()

        runs[name] = there_and_back
        parts[f"{name} routing"] = timed(lambda d=dispatcher: d.plan_routing(chosen).wait())
        parts[f"{name} dispatch"] = timed(lambda d=dispatcher, h=handle: d.dispatch((x,), weights, h).wait())
        parts[f"{name} combine"] = timed(lambda d=dispatcher, h=handle, r=rows: d.combine(r, None, h).wait())
        fp8 = (torch.zeros(tokens, hidden, dtype=torch.uint8), torch.ones(tokens, hidden // 128))
        parts[f"{name} fp8"] = timed(lambda d=dispatcher, h=handle, f=fp8: d.dispatch(f, weights, h).wait())
    runs["plain"] = plain({"hop1": handle.hop1, "rail": dispatcher.planner.rail}, hidden * 2)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, fn in runs.items():
            took = timed(fn)
            if number:  # the first round warms up
                times[name].append(took[0])
            parts[name] = took
    hits = minimum_rows(chosen, topology, rank)
    return {"times": times, "bytes": {k: v[1] for k, v in parts.items()}, "minimum": hits * hidden * 2}


def minimum_rows(chosen: torch.Tensor, topology: Topology, rank: int) -> int:
    """Distinct (token, other node) pairs: no dispatcher can send fewer rows between nodes."""
    owner = chosen // (EXPERTS // topology.ranks)
    node_of = torch.tensor([topology.node_of(r) for r in range(topology.ranks)])[owner]
    here = topology.node_of(rank)
    return sum(int((node_of == node).any(1).sum()) for node in range(len(topology.nodes)) if node != here)


def report(sizes: list[int], ranks: list[dict[str, Any]], rate: str) -> None:
    firsts = [sum(sizes[:node]) for node in range(len(sizes))]
    total = {key: sum(ranks[first]["bytes"][key] for first in firsts) for key in ranks[0]["bytes"]}
    minimum = sum(rank["minimum"] for rank in ranks)
    median = {name: statistics.median(ranks[0]["times"][name]) for name in ranks[0]["times"]}
    print(f"\n{len(sizes)} nodes x {sizes[0]} ranks, {rate} between nodes; bytes between nodes, all nodes together")
    print(f"  proven minimum, one direction            {minimum:>12,}")
    for name in ("hierarchical", "flat"):
        for part in ("dispatch", "combine", "fp8", "routing"):
            size = total[f"{name} {part}"]
            print(f"  {name + ' ' + part:<40} {size:>12,}  {size / minimum:6.3f} x minimum")
    print(f"  flat / hierarchical, dispatch            {total['flat dispatch'] / total['hierarchical dispatch']:12.2f}")
    print(
        f"  fp8 / bf16, hierarchical dispatch        {total['hierarchical fp8'] / total['hierarchical dispatch']:12.3f}"
    )
    print(f"  plain there and back                     {total['plain']:>12,}")
    for name, seconds in median.items():
        print(f"  seconds, dispatch + combine, {name:<12} {seconds:12.3f}")
    ratios = [h / p for h, p in zip(ranks[0]["times"]["hierarchical"], ranks[0]["times"]["plain"], strict=True)]
    print(f"  hierarchical / plain                     {median['hierarchical'] / median['plain']:12.3f}"
          f"  (by round {min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip
    print(f"  flat / hierarchical                      {median['flat'] / median['hierarchical']:12.2f}", flush=True)


def by_torchrun(names: list[str], sizes: list[int], words: list[str]) -> list[dict[str, Any]]:
    """One torchrun agent per namespace, as on a cluster; rank 0 writes everyone's results."""
    out = Path(f"/tmp/dryvine-netns-{os.getpid()}.json")
    agents = []
    for node, name in enumerate(names):
        torchrun = ["-m", "torch.distributed.run", f"--nnodes={len(names)}", f"--nproc_per_node={sizes[node]}"]
        torchrun += [f"--node_rank={node}", "--master_addr=10.77.0.1", "--master_port=29577", "-m", __spec__.name]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        command = ["ip", "netns", "exec", name, sys.executable, *torchrun, *words, "--out", str(out)]
        agents.append(subprocess.Popen(command, env=environment))
    assert [agent.wait(600) for agent in agents] == [0] * len(agents)
    results: list[dict[str, Any]] = json.loads(out.read_text())
    out.unlink()
    return results


def under_torchrun(sizes: list[int], given: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mine = measure(dist.get_rank(), sizes, given.tokens, given.hidden, given.rounds)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        Path(given.out).write_text(json.dumps(everyone))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="200mbit", help="tc's rate between nodes")
    parser.add_argument("--tokens", type=int, default=256, help="per rank")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default="2x2,4x2", help="nodes x ranks")
    parser.add_argument("--torchrun", action="store_true")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for shape in given.shapes.split(","):
        count, local = map(int, shape.split("x"))
        sizes = [local] * count
        if "RANK" in os.environ:
            return under_torchrun(sizes, given)
        if lacking := netns_bed.missing():
            raise SystemExit(lacking)
        with netns_bed.nodes(count, given.rate) as names:
            if given.torchrun:
                words = ["--tokens", str(given.tokens), "--hidden", str(given.hidden), "--rounds", str(given.rounds)]
                ranks = by_torchrun(names, sizes, [*words, "--shapes", shape])
            else:
                what = (sizes, given.tokens, given.hidden, given.rounds)
                ranks = netns_bed.run(names, sizes, measure, *what, deadline=600)
        report(sizes, ranks, given.rate)


if __name__ == "__main__":
    main()
