"""A rank that dies, stops or dawdles in the middle of a dispatch is named by all others, within the deadline + 10 s."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dryvine.comm.dispatch.hierarchical import Hierarchical, build
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.topology import by_sizes
from dryvine.comm.watch import CODE, CommError, watch_world

DEADLINE = 2.0
HOUR = timedelta(hours=1)


def rank_main(rank: int, folder: Path, how: str, when: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=HOUR)
    watch = watch_world(DEADLINE)
    mesh = replace(make_mesh(Layout(ep=4), torch.device("cpu"), HOUR), watch=watch)
    dispatcher = build(Setup(8, mesh, by_sizes([2, 2])))
    try:
        for microbatch in range(100):
            lose = how if rank == 2 and microbatch == 3 else ""
            step(dispatcher, f"layer 3, microbatch {microbatch}", lose, when, folder)
    except CommError as error:
        (folder / f"error{rank}").write_text(str(error))
        raise SystemExit(3) from error
    except ValueError as error:
        watch.fail(error)
    except EarlyExit:
        watch.close()


def step(dispatcher: Hierarchical, label: str, lose: str, when: str, folder: Path) -> None:
    experts = torch.arange(8).expand(50, 8)
    if when == "routing":
        go_down(lose, folder)
    handle = dispatcher.plan_routing(experts, label=label).wait()
    if when == "dispatch":
        go_down(lose, folder)
    (rows,) = dispatcher.dispatch((torch.ones(50, 64),), None, handle).wait()
    if when == "combine":
        go_down(lose, folder)
    dispatcher.combine(rows, None, handle).wait()


def go_down(how: str, folder: Path) -> None:
    if how:
        (folder / "down").write_text(str(time.time()))
    if how == "slow":
        time.sleep(60)
    elif how == "raise":
        raise ValueError("layer 3 exploded\nin many pieces")
    elif how == "leave":
        raise EarlyExit
    elif how:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])


LOSSES = [
    ("kill", "routing"),
    ("kill", "dispatch"),
    ("stop", "combine"),
    ("slow", "dispatch"),
    ("raise", "dispatch"),
    ("leave", "routing"),
]


class EarlyExit(Exception):
    """This rank parts in order, too early."""


class Job:
    """Four ranks of which rank 2 is lost; all jobs run at once, since they mostly wait."""

    def __init__(self, folder: Path, how: str, when: str) -> None:
        context = multiprocessing.get_context("forkserver")
        self.folder = folder
        self.ranks = [context.Process(target=rank_main, args=(r, folder, how, when), daemon=True) for r in range(4)]
        for process in self.ranks:
            process.start()

    def join(self) -> None:
        for process in self.ranks:
            process.join(60)
        self.took = time.time() - float((self.folder / "down").read_text())


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Job]]:
    started = {loss: Job(tmp_path_factory.mktemp("job"), *loss) for loss in LOSSES}
    try:
        waiters = [threading.Thread(target=job.join) for job in started.values()]
        for waiter in waiters:
            waiter.start()
        for waiter in waiters:
            waiter.join()
        yield started
    finally:
        for job in started.values():
            for process in job.ranks:
                process.kill()


CULPRITS = {
    "slow": r"every rank is alive; rank 2 is computing \(posted last: routing hop 2 of layer 3, microbatch 3\) and "
    "has not posted its side of dispatch hop 1 of layer 3, microbatch 3",
    "raise": "rank 2 failed: ValueError: layer 3 exploded",
    "leave": "rank 2 left before the others",
}


@pytest.mark.parametrize(("how", "when"), LOSSES)
def test_a_lost_rank_is_named_by_all_others_in_time(jobs: dict[tuple[str, str], Job], how: str, when: str) -> None:
    job = jobs[how, when]
    assert job.took < DEADLINE + 10
    # A rank that is stopped cannot end itself: a sibling ends it. One that dawdles is ended by its own watch.
    ends = {"slow": CODE, "raise": 1, "leave": 0}
    assert [p.exitcode for p in job.ranks] == [3, 3, ends.get(how, -signal.SIGKILL), 3]
    for rank in (0, 1, 3):
        error = (job.folder / f"error{rank}").read_text()
        assert re.match(rf"rank {rank}: {when} \S+.* of layer 3, microbatch 3: .*", error)
        if rank != 1 or when == "routing":  # rank 1 gets its rows through rank 3 or 0, and waits for those
            assert re.search(r"\d+ bytes from rank 2.* did not come in \d+\.\d s", error), error
        culprit = CULPRITS.get(how, "rank 2 did not answer the roll call: dead or stopped")
        assert re.search(culprit, error), error
