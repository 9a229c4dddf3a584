"""What dispatch costs beside its wire: a bare all_to_all_single of the same splits against Flat's, on loopback.

    .venv/bin/python -m benchmarks.comm.overhead        # 2 ranks, 8192 tokens of hidden 7168 each, BF16, top-8 of 64

The bare exchange and the dispatch take turns, and each dispatch is split by a clock round its own exchange into wire
and the rest: packing rows into sending order and ordering what came, with the Python round it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.host import MALLOC
from dryvine.comm.local import run
from dryvine.comm.pending import Pending


class Clocked(GroupExchange):
    """Counts the seconds from the start of an exchange to its end."""

    seconds = 0.0

    def start(
        self, rows: Tensor, sends: Sequence[int], receives: Sequence[int], into: Tensor | None = None, what: str = ""
    ) -> Pending[Tensor]:
        begun = time.perf_counter()
        coming = super().start(rows, sends, receives, into, what)

        def finish() -> Tensor:
            came = coming.wait()
            self.seconds += time.perf_counter() - begun
            return came

        return Pending(finish)


def timed(fn: Callable[[], Any]) -> float:
    dist.barrier()
    begun = time.perf_counter()
    fn()
    dist.barrier()
    return time.perf_counter() - begun


def measure(rank: int, tokens: int, hidden: int, top_k: int, experts: int, rounds: int) -> dict[str, list[float]]:
    clocked = Clocked(dist.group.WORLD)
    flat = Flat(clocked, experts)
    chosen = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(rank)).topk(top_k).indices
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16)
    handle = flat.plan_routing(chosen).wait()
    out, back = (torch.zeros(sum(rows), hidden // 4, dtype=torch.int64) for rows in (handle.sends, handle.receives))
    seen: dict[str, list[float]] = {"plain": [], "dispatch": [], "wire": []}
    for _ in range(rounds + 1):
        splits = list(handle.receives), list(handle.sends)
        seen["plain"].append(timed(lambda s=splits: dist.all_to_all_single(back, out, *s)))
        clocked.seconds = 0.0
        seen["dispatch"].append(timed(lambda: flat.dispatch((x,), None, handle).wait()))
        seen["wire"].append(clocked.seconds)
    return {name: values[1:] for name, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"ranks": 2, "tokens": 8192, "hidden": 7168, "top-k": 8, "experts": 64, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    os.environ.update(MALLOC, OMP_NUM_THREADS="1")
    shape = (given.tokens, given.hidden, given.top_k, given.experts, given.rounds)
    seen = run(measure, given.ranks, *shape, deadline=1800)[0]
    sent = given.tokens * given.top_k * given.hidden * 2 * (given.ranks - 1) / given.ranks
    plain, wire, whole = (statistics.median(seen[name]) for name in ("plain", "wire", "dispatch"))
    print(f"{given.ranks} ranks, {sent / 1e6:.0f} MB to others per rank; medians of {given.rounds} rounds")
    print(f"  plain all_to_all_single   {plain:7.3f} s   {sent / plain / 1e9:.2f} GB/s")
    print(f"  wire part of dispatch     {wire:7.3f} s   {plain / wire:.2f} of plain's throughput")
    print(f"  permutation and Python    {whole - wire:7.3f} s   {(whole - wire) / whole:.0%} of dispatch")
    print(f"  dispatch in all           {whole:7.3f} s   {plain / whole:.2f} of plain's throughput")


if __name__ == "__main__":
    main()
