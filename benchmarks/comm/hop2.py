"""Hop 2 of two hops by copy engine, beside torch's all-to-all of the same rows, on the GPUs of one host.

    torchrun --nproc-per-node 2 -m benchmarks.comm.hop2 [--rounds 200] [--rows 4096] [--hidden 7168]

Soak: exchanges of random splits, empty ones and rows to oneself included, three under way at once; every row must have
the bits that the all-to-all brings. Times: `--rows` BF16 rows to every rank, as `benchmarks.comm.nvlink` takes them,
alone and beside a GEMM that takes about as long (both from one event to one behind both), which shows what an exchange
takes from compute; `copy` is a bare copy of the bytes to one peer after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.comm.nvlink import device_ms, joined, leave
from dryvine.comm.dispatch.copy_exchange import CopyExchange, open_exchange
from dryvine.comm.dispatch.exchange import Exchange, GroupExchange, own_links
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.pending import Pending
from dryvine.comm.topology import by_sizes

UNDER_WAY = 3


def splits(number: int, ranks: int, most: int) -> list[list[int]]:
    """Rows from each rank to each; in some rounds few, or none."""
    noise = torch.Generator().manual_seed(number)
    drawn = torch.rand(ranks, ranks, generator=noise) * (most if number % 3 else 8)
    return (drawn * (torch.rand(ranks, ranks, generator=noise) < 0.8)).int().tolist()


def soak(exchanges: tuple[CopyExchange, Exchange], rank: int, given: argparse.Namespace) -> str:
    """What was compared. Raises AssertionError at the first difference."""
    ours, theirs = exchanges
    waiting: list[Callable[[], int]] = []
    compared = 0
    for number in range(given.rounds):
        rows = splits(number, ours.size, given.rows)
        sends, receives = rows[rank], [source[rank] for source in rows]
        sent = torch.randint(1 << 60, (sum(sends), given.hidden // 4), device="cuda")
        came = ours.start(sent, sends, receives, what=f"exchange {number}")
        waiting.append(partial(_compare, came, theirs, sent, (sends, receives), number))
        if len(waiting) == UNDER_WAY:
            compared += waiting.pop(0)()
    compared += sum(left() for left in waiting)
    torch.cuda.synchronize()
    return f"{given.rounds} exchanges, {compared / 1e9:.1f} GB compared on rank {rank}"


def _compare(
    came: Pending[Tensor], theirs: Exchange, sent: Tensor, rows: tuple[list[int], list[int]], number: int
) -> int:
    arrived = came.wait()
    reference = theirs.start(sent, *rows, what="reference").wait()
    assert torch.equal(arrived, reference), f"exchange {number} has other bits than the all-to-all"
    return arrived.nbytes


def times(exchanges: tuple[CopyExchange, Exchange], given: argparse.Namespace) -> Table:
    ours, theirs = exchanges
    even = [given.rows] * ours.size
    sent = torch.zeros(sum(even), given.hidden, device="cuda", dtype=torch.bfloat16)
    into = torch.empty_like(sent)
    made = Table(
        "exchange", "alone", "beside a GEMM", "GEMM alone", title=f"ms, {given.rows} x {given.hidden} BF16 to each"
    )
    product = gemm(device_ms(lambda: theirs.start(sent, even, even, into).wait()))
    alone = device_ms(product)
    for name, each in (("copies", ours), ("all-to-all", theirs)):

        def beside(each: Exchange = each) -> Tensor:
            pending = each.start(sent, even, even, into)
            product()
            return pending.wait()

        one = device_ms(lambda each=each: each.start(sent, even, even, into).wait())
        made.add_row(name, f"{one:.3f}", f"{device_ms(beside):.3f}", f"{alone:.3f}")
    made.add_row("copy", f"{device_ms(lambda: bare(ours, sent, given.rows)):.3f}", "", "")
    return made


def gemm(ms: float) -> Callable[[], object]:
    """A product of about that many milliseconds, at 600 TFLOP/s."""
    k = max(512, int(600e9 * ms / (2 * 8192 * 8192)) // 128 * 128)
    a, b = torch.randn(8192, k, device="cuda").bfloat16(), torch.randn(k, 8192, device="cuda").bfloat16()
    out = torch.empty(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return lambda: torch.mm(a, b, out=out)


def bare(exchange: CopyExchange, sent: Tensor, rows: int) -> None:
    """As many bytes as fit a peer's rings, again and again."""
    queue = exchange.links.queue()
    queue.after_caller()
    for step in range(1, exchange.size):
        peer = (exchange.rank + step) % exchange.size
        there = exchange.links.memory(peer)
        for part in sent[:rows].split(max(1, there.nbytes // sent[0].nbytes)):
            queue.copy(there[: part.nbytes].view(part.dtype).view(part.shape), part)
    queue.here().wait()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--rows", type=int, default=4096)
    options.add_argument("--hidden", type=int, default=7168)
    given = options.parse_args()
    mesh = joined()
    assert mesh.experts is not None
    setup = Setup(64, mesh, by_sizes([mesh.ep]), tokens=given.rows, row_bytes=2 * given.hidden)
    ours = open_exchange(mesh.experts, own_links(mesh.ep, mesh.rank), setup)
    assert ours is not None, "the ranks could not open their memory to each other"
    exchanges = ours, GroupExchange(mesh.experts)
    print(soak(exchanges, mesh.rank, given), flush=True)
    leave(mesh, times(exchanges, given))


if __name__ == "__main__":
    main()
