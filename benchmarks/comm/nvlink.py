"""`nvlink` on the GPUs of one host: a soak beside `flat`, then the device time of its parts.

    torchrun --nproc-per-node 2 -m benchmarks.comm.nvlink [--rounds 300] [--tokens 4096] [--hidden 7168]

Soak: random routings, from even to all tokens on one rank's experts, with rows of FP32, BF16 or bytes with scales, and
between one and `--tokens` tokens, different on each rank. Rows must have flat's bits, and sums flat's to rounding; each
round's results are read while the next rounds' copies run, so a flag that overtakes its data shows as other bits.

Times: each measurement queues a sleep of the device, a tiny all-reduce that aligns the ranks, then an event, the
operation and an event, so that neither the host nor the other rank's start is in it. Routing reads the device on the
host and is timed from the all-reduce on, the host included. `wire` is a message of dispatch's rows from the first copy
to the last flag, `copy` a bare copy of its bytes to every peer.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dryvine.comm.dispatch import flat, nvlink
from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.comm.dispatch.nvlink import Nvlink
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.dispatch.windows import WindowRows
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.comm.topology import by_sizes
from dryvine.comm.world import backend

EXPERTS, TOP_K = 64, 8
UNDER_WAY = 1  # rounds whose results are not yet read: two messages, and one round's three more would wait for them
SLEEP = 40_000_000  # cycles: 20 ms, longer than a host takes to queue an operation
REPEATS = 20


class Round:
    """A routing and a payload of one rank: the same for both dispatchers."""

    def __init__(self, number: int, rank: int, most: int, hidden: int, device: torch.device) -> None:
        noise = torch.Generator(device).manual_seed(1000 * number + rank)
        drawn = torch.rand(2, generator=noise, device=device).tolist()
        tokens = 1 + int(drawn[0] * (most - 1))
        affinity = torch.rand(tokens, EXPERTS, generator=noise, device=device)
        affinity[:, : EXPERTS // 2] += 2 * max(drawn[1] - 0.5, 0.0)  # half of the rounds are skewed
        self.chosen = affinity.topk(TOP_K).indices
        self.weights = torch.rand(tokens, TOP_K, generator=noise, device=device)
        rows = torch.randn(tokens, hidden, generator=noise, device=device)
        values = torch.randint(0, 255, rows.shape, generator=noise, device=device, dtype=torch.uint8)
        payloads = ((rows[:, : hidden // 2].contiguous(),), (rows.bfloat16(),), (values, rows[:, : hidden // 128]))
        self.payload = payloads[number % 3]  # of the same kind on all ranks

    def play(self, dispatcher: AnyDispatcher) -> Callable[[], list[Tensor]]:
        """Start it; the result reads it."""
        handle = dispatcher.plan_routing(self.chosen, "soak").wait()
        came = dispatcher.dispatch(self.payload, self.weights, handle)

        def finish() -> list[Tensor]:
            *rows, weights = came.wait()
            found = [*rows, weights]
            if rows[0].is_floating_point():
                found += dispatcher.combine(rows[0] * weights[:, None].to(rows[0].dtype), weights, handle).wait()
            return found

        return finish


def soak(mesh: Mesh, pair: tuple[AnyDispatcher, AnyDispatcher], rounds: int, most: int, hidden: int) -> str:
    """What was compared. Raises AssertionError at the first difference."""
    ours, theirs = pair
    waiting: list[tuple[int, Round, Callable[[], list[Tensor]]]] = []
    compared, began = 0, time.monotonic()
    for number in range(rounds + UNDER_WAY):
        if number < rounds:
            drawn = Round(number, mesh.rank, most, hidden, mesh.device)
            waiting.append((number, drawn, drawn.play(ours)))
        if number >= UNDER_WAY:
            which, drawn, finish = waiting.pop(0)
            compared += _compare(which, finish(), drawn.play(theirs)())
    torch.cuda.synchronize()
    return f"{rounds} rounds, {compared / 1e9:.1f} GB compared on rank {mesh.rank}, {time.monotonic() - began:.0f} s"


def _compare(number: int, ours: list[Tensor], theirs: list[Tensor]) -> int:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # Behind rows and weights comes the sum of rows, which nvlink rounds once more than flat.
        if index == 2 and len(ours) == 4:
            worst = float((a - b).abs().max() / b.abs().max()) if len(b) else 0.0
            assert worst < (2e-2 if b.dtype == torch.bfloat16 else 1e-6), f"round {number}: sums differ by {worst:.1e}"
        else:
            assert torch.equal(a, b), f"round {number}: result {index} has other bits than flat's"
    return sum(t.nbytes for t in ours)


def device_ms(fn: Callable[[], object], reads: bool = False) -> float:
    """Of the slowest rank, median; `reads`: fn makes the host wait, so its part of the time counts."""
    one, found = torch.zeros(1, device="cuda"), []
    for _ in range(REPEATS + 2):
        torch.cuda.synchronize()
        if not reads:
            torch.cuda._sleep(SLEEP)
        dist.all_reduce(one)
        if reads:
            torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        kept = fn()
        end.record()
        end.synchronize()
        del kept
        slowest = torch.tensor([begin.elapsed_time(end)], device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        found.append(float(slowest))
    return median(found[2:])


def times(dispatchers: dict[str, AnyDispatcher], tokens: int, hidden: int, device: torch.device) -> Table:
    heads = ("backend", "payload", "routing", "dispatch", "combine", "wire", "copy")
    table = Table(*heads, title=f"ms, {tokens} x {hidden}")
    chosen = torch.rand(tokens, EXPERTS, device=device).topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K, device=device)
    noise = torch.randn(tokens, hidden, device=device)
    fp8 = (noise.to(torch.float8_e4m3fn).view(torch.uint8), noise[:, : hidden // 128].contiguous())
    for payload in ((noise.bfloat16(),), fp8):
        for name, dispatcher in dispatchers.items():
            handle = dispatcher.plan_routing(chosen).wait()
            back = torch.randn(sum(handle.counts), hidden, device=device, dtype=torch.bfloat16)
            parts = [
                device_ms(lambda d=dispatcher: d.plan_routing(chosen).wait(), reads=True),
                device_ms(lambda d=dispatcher, h=handle, p=payload: d.dispatch(p, weights, h).wait()),
                device_ms(lambda d=dispatcher, h=handle, b=back: d.combine(b, None, h).wait()),
            ]
            if isinstance(dispatcher, Nvlink):
                parts += [device_ms(lambda d=dispatcher, p=payload, f=f: f(d, p)) for f in (wire, bare_copy)]
            table.add_row(name, str(payload[0].dtype)[6:], *(f"{ms:.3f}" for ms in parts))
    return table


def wire(dispatcher: Nvlink, payload: tuple[Tensor, ...]) -> None:
    """A message whose rows are not read."""
    rooms = tuple(WindowRows.of(tensor, dispatcher.most) for tensor in payload)
    dispatcher.windows.start(lambda _: payload, rooms, lambda came: None, "wire").wait()


def bare_copy(dispatcher: Nvlink, payload: tuple[Tensor, ...]) -> None:
    """The payload into every peer's memory, one after the other, and back to this stream: no flags, no spreading. With
    a queue for each peer it takes longer: on 4 x H200 0.89 ms, where messages by one queue take 0.50, with flags."""
    windows = dispatcher.windows
    queue, start = windows.links.queue(), windows.rank * sum(t.nbytes for t in payload)
    queue.after_caller()
    for step in range(1, windows.ranks):
        memory, place = windows.links.memory((windows.rank + step) % windows.ranks), start
        for tensor in payload:
            queue.copy(memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape), tensor)
            place += tensor.nbytes
    queue.here().wait()


def joined() -> Mesh:
    """torchrun's ranks, all expert-parallel, each with a GPU of this host."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend("cuda"))
    device = torch.device("cuda", torch.cuda.current_device())
    return make_mesh(Layout(ep=dist.get_world_size()), device, timedelta(seconds=120))


def leave(mesh: Mesh, made: Table) -> None:
    """Print the first rank's table with the machine, and part."""
    if mesh.rank == 0:
        print(f"{mesh.ep} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
        Console(width=100).print(made)
    dist.destroy_process_group()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=300)
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--hidden", type=int, default=7168)
    given = options.parse_args()
    mesh, row = joined(), 2 * given.hidden
    setup = Setup(EXPERTS, mesh, by_sizes([mesh.ep]), top_k=TOP_K, tokens=given.tokens, row_bytes=row)
    ours, theirs = nvlink.build(setup), flat.build(setup)
    assert isinstance(ours, Nvlink), "the ranks could not open their memory to each other"
    print(soak(mesh, (ours, theirs), given.rounds, given.tokens, given.hidden), flush=True)
    leave(mesh, times({"nvlink": ours, "flat": theirs}, given.tokens, given.hidden, mesh.device))


if __name__ == "__main__":
    main()
