"""How long a start takes to have its state again: from its own node's memory, from another node's, and from storage.

    python -m benchmarks.restarts [--mib 256] [--rounds 3] [--memory /dev/shm] [--out FOLDER]

Four ranks of this machine as two nodes, each with so many MiB of state; every byte is compared with its checksum on
each way. Medians over rounds, all in one run. Storage is a disk whose pages are dropped from the cache before; a shared
file system of a cluster is farther away, and so is another node than another folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from dryvine.comm import local
from dryvine.comm.buddies import make_links
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.comm.topology import by_sizes
from dryvine.trainer.checkpoint.load import load, newest_sound
from dryvine.trainer.checkpoint.memory_load import recall
from dryvine.trainer.checkpoint.memory_saver import MemorySaver
from dryvine.trainer.checkpoint.save import Keep, Saver
from dryvine.trainer.checkpoint.state import RunState
from dryvine.trainer.config import RunConfig
from dryvine.trainer.data.identity import UNKNOWN

NODES = by_sizes([2, 2])
TENSORS = 16
Times = dict[str, float]  # seconds


def measure(rank: int, mib: int, out: Path, memory: Path) -> Times:
    """Of one round, on one rank."""
    folder = memory / f"host-{NODES.node_of(rank)}"
    folder.mkdir(exist_ok=True)
    run = RunConfig(name="run", steps=9, out=str(out), buddy_every=1, buddy_folder=str(folder))
    mesh = make_mesh(Layout(ep=4), torch.device("cpu"), timedelta(seconds=300))
    links, node, state = make_links(NODES, rank, mesh.timeout), NODES.node_of(rank), _state(rank, mib)
    saver = Saver(run.folder, Keep(1), mesh)
    saver.prepare(state)
    saver.begin(1, state)
    saver.close()
    keeper = MemorySaver(run, mesh, node, links, UNKNOWN)
    keeper.prepare(state)
    times = {"a step stands still for a copy in memory": _timed(mesh, lambda: keeper.begin(1, state))}
    times["until it is in both memories"] = _timed(mesh, keeper.finish)
    times["from its own node's memory"] = _timed(mesh, lambda: _recalled(run, mesh, node, state))
    if rank == 0:
        shutil.rmtree(memory / "host-1")
    mesh.barrier("a node is lost")
    folder.mkdir(exist_ok=True)
    times["with one of two nodes lost"] = _timed(mesh, lambda: _recalled(run, mesh, node, state))
    for file in run.folder.glob("checkpoints/*/*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    times["from storage"] = _timed(mesh, lambda: _stored(run, mesh, state))
    return times


def _state(rank: int, mib: int) -> RunState:
    size = mib * 2**20 // 4 // 3 // TENSORS
    fields = ("master", "exp_avg", "exp_avg_sq")
    pieces = {(f"w{i}", rank * size): {field: torch.randn(size) for field in fields} for i in range(TENSORS)}
    return RunState(pieces, {}, {f"w{i}": (4 * size,) for i in range(TENSORS)})


def _recalled(run: RunConfig, mesh: Mesh, node: int, state: RunState) -> None:
    assert recall(run, mesh, node, UNKNOWN, state).step == 1


def _stored(run: RunConfig, mesh: Mesh, state: RunState) -> None:
    found = newest_sound(run.folder, mesh, "stop").reader
    assert found
    load(found, state, mesh)


def _timed(mesh: Mesh, action: Callable[[], object]) -> float:
    """Until the last rank has done it."""
    mesh.barrier("the start of a measurement")
    started = time.perf_counter()
    action()
    mesh.barrier("the end of a measurement")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rounds: list[Times] = []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory(dir=given.out) as out, tempfile.TemporaryDirectory(dir=given.memory) as memory:
            rounds.append(local.run(measure, 4, given.mib, Path(out), Path(memory), deadline=600)[0])
    storage = median(times["from storage"] for times in rounds)
    table = Table("", "s", "of the start from storage", title=f"{given.mib} MiB a rank, {given.rounds} rounds")
    for name in rounds[0]:
        seconds = median(times[name] for times in rounds)
        table.add_row(name, f"{seconds:.2f}", f"{seconds / storage:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
