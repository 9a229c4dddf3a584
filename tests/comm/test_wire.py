"""Messages between ranks: whoever is lost is named, with the rank's number in the world, by the one that waits for it
or posts to it."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.comm.watch import CommError, Watch, watch_world
from dryvine.comm.wire import P2PWire

DEADLINE = timedelta(seconds=3)
CPU = torch.device("cpu")


def start(folder: Path, rank: int, world: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=DEADLINE)


def on_ranks(world: int, main: Callable[..., None], folder: Path, *args: object, until: int = 0) -> None:
    """Run `main(rank, folder, *args)` as processes that may die, until rank `until` is done."""
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=main, args=(r, folder, *args), daemon=True) for r in range(world)]
    for process in ranks:
        process.start()
    ranks[until].join(30)
    for process in ranks:
        process.kill()
        process.join()


def rank_main(rank: int, folder: Path, how: str) -> None:
    start(folder, rank, 2)
    mesh = make_mesh(Layout(pp=2), CPU, DEADLINE)
    wire = P2PWire(replace(mesh, watch=watch_world(DEADLINE.total_seconds())))
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
    on_ranks(2, rank_main, tmp_path, how)
    assert (tmp_path / "came").read_text() == "tensor(4.)"
    said = (tmp_path / "error").read_text()
    assert "rank 0: receiving gradients of route 0: 16 bytes from rank 1" in said
    assert "rank 1 did not answer the roll call" in said


def wire_send(mesh: Mesh, watch: Watch) -> None:
    P2PWire(replace(mesh, watch=watch)).send((torch.ones(4),), 1, (0, "down"))


def wire_receive(mesh: Mesh, watch: Watch) -> None:
    P2PWire(replace(mesh, watch=watch)).receive((torch.empty(4),), 1, (0, "up"))


def exchange(mesh: Mesh, watch: Watch) -> None:
    group = GroupExchange(dist.group.WORLD, watch=watch)
    group.start(torch.ones(2, 3), [1, 1], [1, 1], what="dispatch of layers.3").wait()


POSTS = {
    "send": (wire_send, "sending activations of route 0 to rank 1; rank 1 did not answer the roll call"),
    "receive": (wire_receive, r"receiving gradients of route 0: 16 bytes from rank 1 did not come.*; rank 1 did not"),
    "exchange": (exchange, r"dispatch of layers.3: 12 bytes from rank 1 did not come.*; rank 1 did not"),
}


def post_to_the_dead(rank: int, folder: Path, what: str) -> None:
    start(folder, rank, 2)
    mesh = make_mesh(Layout(pp=2), CPU, DEADLINE)
    watch = watch_world(DEADLINE.total_seconds())
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), 9)
    # The transport learns of the death when something is posted: the first post may still pass, the next cannot.
    with suppress(RuntimeError):
        dist.barrier()
    time.sleep(0.5)
    try:
        for _ in range(3):
            POSTS[what][0](mesh, watch)  # a message to a neighbour is only posted: no rank waits for it
            time.sleep(0.2)
    except CommError as error:
        (folder / "error").write_text(str(error))


@pytest.mark.parametrize("what", POSTS)
def test_posting_to_a_rank_that_is_lost_names_it_too(tmp_path: Path, what: str) -> None:
    on_ranks(2, post_to_the_dead, tmp_path, what)
    error = (tmp_path / "error").read_text()
    assert re.match(f"rank 0: {POSTS[what][1]}", error), error


def second_pipeline(rank: int, folder: Path) -> None:
    """World ranks 1 and 3 are the second of two pipelines; rank 3 is its second stage and is lost."""
    start(folder, rank, 4)
    mesh = make_mesh(Layout(pp=2, dp=2), CPU, DEADLINE)
    watch = watch_world(DEADLINE.total_seconds())
    if rank == 3:
        os.kill(os.getpid(), 19)
    try:
        if rank == 1:
            P2PWire(replace(mesh, watch=watch)).receive((torch.empty(4),), 1, (0, "up")).wait()
        else:
            time.sleep(20)
    except CommError as error:
        (folder / "error").write_text(str(error))


def test_a_neighbour_is_named_by_its_rank_in_the_world(tmp_path: Path) -> None:
    # Rank 0 has nothing to say, and may end before rank 1 has written its error.
    on_ranks(4, second_pipeline, tmp_path, until=1)
    assert "rank 1: receiving gradients of route 0: 16 bytes from rank 3 did not" in (tmp_path / "error").read_text()
