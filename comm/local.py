"""Runs a function on N ranks of this machine: a file store, and processes forked from one that has imported torch.

Tests and `dryvine verify` use it. Importing torch costs seconds per process; a forkserver that has imported it once
starts eight ranks in a fifth of a second. torchrun would be closer to production and fifty times slower.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from dryvine.comm.world import backend, set_environment

R = TypeVar("R")


class RankFailed(RuntimeError):
    """A rank raised, died or overran the deadline; the message holds each failed rank's traceback."""


def preload(*modules: str) -> None:
    """Have the forkserver import what ranks need besides torch, once instead of in each rank. Call it before the
    first `run`. Not for a module that was started with `python -m`: every rank runs that as its own main module, and
    Python warns if it has been imported."""
    # What making any optimizer imports: two seconds of it.
    lazily = ["torch._dynamo", "torch.distributed.tensor"]
    names = ["__main__", "torch", "torch.distributed", "dryvine.comm.local", *lazily, *modules]
    multiprocessing.get_context("forkserver").set_forkserver_preload(names)


def run(fn: Callable[..., R], world: int, *args: object, deadline: float = 120.0, device: str = "cpu") -> list[R]:
    """Call `fn(rank, *args)` on `world` ranks and return their results in rank order: gloo ranks, or with device "cuda"
    one for each of the first GPUs.

    `fn` and its results must pickle. After `deadline` seconds, or as soon as a rank fails, all ranks are killed and
    RankFailed is raised, which names the culprits.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank,
                args=(theirs, _World(folder, rank, world, deadline, device), fn, args),
                daemon=True,
            )
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


def _collect(pipes: list[Connection], until: float) -> list[R]:
    results: dict[int, R] = {}
    left = dict(enumerate(pipes))
    while left:
        ready = wait(list(left.values()), timeout=max(0.0, until - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(left)} of {len(pipes)} had not finished at the deadline")
        for rank in [r for r, pipe in left.items() if pipe in ready]:
            try:
                succeeded, value = pickle.loads(left.pop(rank).recv_bytes())
            except EOFError:
                raise RankFailed(f"rank {rank} of {len(pipes)} died without a traceback") from None
            if not succeeded:
                raise RankFailed(f"rank {rank} of {len(pipes)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


class _World(NamedTuple):
    """What a rank must know to join the others."""

    folder: str
    rank: int
    size: int
    deadline: float
    device: str

    def join(self) -> None:
        if self.device == "cuda":
            set_environment(os.environ)
            torch.cuda.set_device(self.rank)
        store, timeout = dist.FileStore(f"{self.folder}/store", self.size), timedelta(seconds=self.deadline)
        dist.init_process_group(
            backend(self.device), store=store, rank=self.rank, world_size=self.size, timeout=timeout
        )


def _rank(pipe: Connection, world: _World, fn: Callable[..., object], args: tuple[object, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        world.join()
        _send(pipe, True, fn(world.rank, *args))
        dist.barrier()  # no rank leaves while another may still send to it
        dist.destroy_process_group()
    except BaseException:
        _send(pipe, False, traceback.format_exc())


def _send(pipe: Connection, succeeded: bool, value: object) -> None:
    """By value. `Connection.send` would leave a tensor's numbers for the reader to fetch from this process, which may
    have ended by then."""
    pipe.send_bytes(pickle.dumps((succeeded, value)))
