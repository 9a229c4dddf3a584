"""Several nodes on one machine: Linux network namespaces joined by a bridge, links shaped with tc, bytes from veth.

A rank is forked from a server that has torch loaded and then enters its node's namespace, so traffic between nodes
passes that node's eth0 and traffic inside a node its lo, as on real machines; only the kernel's counters are read.
Needs root and iproute2; `missing()` says what is missing.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

CLONE_NEWNET = 0x40000000
T = TypeVar("T")


def missing() -> str:
    """Why namespaces cannot be created here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "network namespaces need iproute2 (ip, tc)"
    probe = subprocess.run(["ip", "netns", "add", f"dv{os.getpid()}p"], capture_output=True, text=True)
    if probe.returncode:
        return f"network namespaces are refused here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"dv{os.getpid()}p"], check=True)
    return ""


@contextmanager
def nodes(count: int, rate: str = "") -> Iterator[list[str]]:
    """Namespaces with eth0 at 10.77.0.1, .2, ... on one bridge, each shaped to `rate` (tc syntax) when sending."""
    tag = f"dv{os.getpid()}"
    names = [f"{tag}n{i}" for i in range(count)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("netns", "add", f"{tag}b")
        ip("-n", f"{tag}b", "link", "add", "br0", "type", "bridge")
        ip("-n", f"{tag}b", "link", "set", "br0", "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns", f"{tag}b")
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", f"{tag}b", "link", "set", f"port{i}", "master", "br0", "up")
            if rate:
                shape = f"qdisc add dev eth0 root tbf rate {rate} burst 256kb latency 50ms".split()
                subprocess.run(["tc", "-n", name, *shape], check=True, capture_output=True)
        yield names
    finally:
        for name in [*names, f"{tag}b"]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def sent_bytes() -> int:
    """Bytes that have left this rank's node, headers included: the kernel's count for eth0."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "eth0":
            return int(values.split()[8])
    raise LookupError("no eth0 in this namespace")


@dataclass(frozen=True)
class _Rank(Generic[T]):
    """What one rank process runs, and where."""

    rank: int
    world: int
    namespace: str
    store: str  # file through which the ranks find each other
    deadline: float
    fn: Callable[..., T]
    args: tuple[object, ...]

    def enter_namespace(self) -> None:
        with open(f"/run/netns/{self.namespace}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {self.namespace}")

    def run(self) -> T:
        self.enter_namespace()
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        torch.set_num_threads(1)
        store, timeout = dist.FileStore(self.store, self.world), timedelta(seconds=self.deadline)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world, timeout=timeout)
        return self.fn(self.rank, *self.args)


def run(
    names: Sequence[str], sizes: Sequence[int], fn: Callable[..., T], *args: object, deadline: float = 60
) -> list[T]:
    """Run `fn(rank, *args)` on gloo ranks, the first sizes[0] of them on node 0 and so on. Returns results by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "dryvine.comm.local"])
    homes = [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank, home in enumerate(homes):
            ours, theirs = context.Pipe(duplex=False)
            job = _Rank(rank, len(homes), home, f"{folder}/store", deadline, fn, args)
            processes.append(context.Process(target=_run_and_send, args=(theirs, job), daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            answers = [pipe.recv() if pipe.poll(deadline) else (False, "no answer by the deadline") for pipe in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    for rank, (succeeded, value) in enumerate(answers):
        assert succeeded, f"rank {rank}: {value}"
    return [value for _, value in answers]


def _run_and_send(pipe: Connection, job: _Rank[object]) -> None:
    try:
        pipe.send((True, job.run()))
        dist.barrier()  # no rank leaves while another still talks to it
    except BaseException:
        pipe.send((False, traceback.format_exc()))
