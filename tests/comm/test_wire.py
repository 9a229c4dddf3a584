"""Stage-to-stage messages: a rank that is lost is named by the one that waits for it."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dryvine.comm.mesh import make_mesh
from dryvine.comm.watch import CommError, watch_world
from dryvine.comm.wire import P2PWire

DEADLINE = timedelta(seconds=3)


def rank_main(rank: int, folder: Path, how: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=DEADLINE)
    mesh = make_mesh(2, 1, 1, 1, torch.device("cpu"), DEADLINE)
    wire = P2PWire(mesh, watch_world(DEADLINE.total_seconds()))
    if rank == 1:
        wire.send((torch.ones(4),), 0, (0, "up")).wait()
        os.kill(os.getpid(), {"kill": 9, "stop": 19}[how])
    try:
        for _ in range(2):
            (came,) = wire.receive((torch.empty(4),), 1, (0, "up")).wait()
            (folder / "came").write_text(str(came.sum()))
    except CommError as error:
        (folder / "error").write_text(str(error))


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_lost_neighbour_is_named_with_what_it_owed(tmp_path: Path, how: str) -> None:
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=rank_main, args=(r, tmp_path, how), daemon=True) for r in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(30)
    for process in ranks:
        process.kill()
        process.join()
    assert (tmp_path / "came").read_text() == "tensor(4.)"
    said = (tmp_path / "error").read_text()
    assert "rank 0: receiving gradients of route 0: 16 bytes from rank 1" in said
    assert "rank 1 did not answer the roll call" in said
