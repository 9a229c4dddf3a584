"""One rank in a world of several: joining it, being watched, and leaving it, in order or after a failure.

A rank that fails tells the others and exits at once, without the destructors of what it shares with them, which might
wait for them.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable, MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist

from dryvine.comm.agreement import Disagreement, Facts, Statement, agree
from dryvine.comm.ending import Ending
from dryvine.comm.place import LaunchedRank, PlaceError
from dryvine.comm.watch import Show, Watch, watch_world

# torch's own watchdog is the last resort: it must not act before the watch, nor write dumps, nor wait a minute for it.
# A GPU has 8 hardware queues by default: a wait in one stream would hold up others that share its queue.
ENVIRONMENT = {
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "60",
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}
LATER = 60.0  # seconds after the deadline that torch's own runs out on a GPU


def set_environment(environment: MutableMapping[str, str]) -> None:
    """Set the variables that torch and CUDA read at their start, unless the user has set them."""
    for name, value in ENVIRONMENT.items():
        environment.setdefault(name, value)


def backend(device: str) -> str:
    """The backend of process groups for tensors on `device` ("cpu" or "cuda"); Python objects always go over gloo."""
    return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"


def timeout(deadline: float, device: torch.device) -> timedelta:
    """The timeout of process groups. gloo's is the deadline itself: nothing else can end its waits for messages."""
    return timedelta(seconds=deadline + (LATER if device.type == "cuda" else 0.0))


def join(place: LaunchedRank, patience: float) -> dist.Store:
    """Connect to the store of all launched ranks, which rank 0 serves unless the launcher does. Waits up to `patience`
    seconds for its host but not for the other ranks, so that missing ones can be named. Raises PlaceError."""
    wait = timedelta(seconds=patience)
    try:
        return _tell_port(place, wait) if place.port == 0 else _store(place, place.port, wait)
    except dist.DistNetworkError as error:
        what = "be served" if place.rank == 0 and not place.served else f"be reached in {patience:g} s"
        raise PlaceError(
            f"rank {place.rank}: the store of rank 0 at {place.address}:{place.port} cannot {what} "
            f"({str(error).splitlines()[0][:150]}); set MASTER_ADDR, MASTER_PORT to a free port of rank 0's host"
        ) from None


# Seconds that ranks wait for each other at the start: as long as building the embedded corpus may take.
PATIENCE = 600.0


def rendezvous(place: LaunchedRank, facts: Facts, refusal: str = "") -> dist.Store | None:
    """The store of all ranks, once these have stated the same `facts`; None for a rank alone. With `refusal`, why this
    rank cannot start, it does not return. Raises Disagreement, on all ranks alike, or PlaceError. Collective."""
    if place.world == 1:
        return None
    store = join(place, PATIENCE)
    if place.attempt:  # the launcher's store still has what ranks of the attempts before have said
        store = dist.PrefixStore(f"attempt {place.attempt}", store)
    agree(store, place.world, Statement(place.rank, socket.gethostname(), facts, refusal), PATIENCE)
    return store


def share_refusal(place: LaunchedRank, error: ValueError) -> ValueError:
    """Tell the other ranks that this one cannot start. Returns the error with which all of them end, or this rank's
    own if it is the only rank. Collective."""
    if isinstance(error, PlaceError | Disagreement):
        return error
    try:
        rendezvous(place, {}, str(error))
    except Disagreement as together:
        return together
    except PlaceError:
        pass
    return error


def _store(place: LaunchedRank, port: int, wait: timedelta) -> dist.TCPStore:
    serves = place.rank == 0 and not place.served
    return dist.TCPStore(place.address, port, None, serves, wait, wait_for_workers=False)


def _tell_port(place: LaunchedRank, wait: timedelta) -> dist.TCPStore:
    """Rank 0 takes a free port and broadcasts it over MPI."""
    from mpi4py import MPI

    served = _store(place, 0, wait) if place.rank == 0 else None
    port = MPI.COMM_WORLD.bcast(served.port if served else 0)
    return served or _store(place, port, wait)


def in_world(
    body: Callable[[Watch], int],
    deadline: float,
    device: torch.device,
    met: tuple[LaunchedRank, dist.Store] | None = None,
    show: Show = traceback.print_exception,
) -> int:
    """Call `body` as one rank of those that the launcher started. `met` are this rank's place and the ranks' store,
    None where torchrun's environment says both. Returns the exit code. If `body` raises, `show` prints the error, the
    other ranks are told, and the process ends."""
    place, store = met or (LaunchedRank(rank=-1, world=-1), None)  # -1: as torch finds it
    dist.init_process_group(
        backend(device.type),
        timeout=timeout(deadline, device),
        store=store,
        rank=place.rank,
        world_size=place.world,
    )
    watch = watch_world(deadline, device)
    try:
        code = body(watch)
    except BaseException as error:
        watch.fail(error, show)
        raise
    watch.close()
    ending = Ending()
    ending.within(deadline)  # a communicator's destructor may wait for a rank that is gone
    dist.destroy_process_group()
    ending.postpone()
    return code
