"""Run a function on N CPU ranks of this machine: gloo, a file store, and processes forked from one that has torch.

Tests and `dryvine verify` use it. Importing torch costs seconds per process; a forkserver that has imported it once
starts eight ranks in a fifth of a second. torchrun would be closer to production and fifty times slower.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


class RankFailed(RuntimeError):
    """A rank raised, died or overran the deadline; the message holds each failed rank's traceback."""


def preload(*modules: str) -> None:
    """Name what ranks need besides torch, so that it is imported once and not by each. For before the first `run`."""
    lazily = ["torch._dynamo", "torch.distributed.tensor"]  # what making any optimizer imports, two seconds of it
    names = ["__main__", "torch", "torch.distributed", "dryvine.comm.local", *lazily, *modules]
    multiprocessing.get_context("forkserver").set_forkserver_preload(names)


def run(fn: Callable[..., Any], world: int, *args: Any, deadline: float = 120.0) -> list[Any]:
    """Call `fn(rank, *args)` on `world` gloo ranks and give their results in rank order.

    `fn` and its results must pickle. After `deadline` seconds, or as soon as a rank fails, all ranks are killed and
    RankFailed names the culprits.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(theirs, folder, rank, world, deadline, fn, args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + deadline)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], until: float) -> list[Any]:
    results: dict[int, Any] = {}
    left = dict(enumerate(pipes))
    while left:
        ready = wait(list(left.values()), timeout=max(0.0, until - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(left)} of {len(pipes)} had not finished at the deadline")
        for rank in [r for r, pipe in left.items() if pipe in ready]:
            try:
                fine, value = left.pop(rank).recv()
            except EOFError:
                raise RankFailed(f"rank {rank} of {len(pipes)} died without a word") from None
            if not fine:
                raise RankFailed(f"rank {rank} of {len(pipes)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, folder: str, rank: int, world: int, deadline: float, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=deadline))
        pipe.send((True, fn(rank, *args)))
        dist.barrier()  # nobody leaves while another may still talk to it
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
