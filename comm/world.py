"""One rank's stay in a world of several: joining it, the watch over it, and leaving it, whichever way that goes.

What can be left in order is left in order. A rank that fails tells the others and ends at once, without the destructors
of what it shares with them, which might wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist

from dryvine.comm.ending import Ending
from dryvine.comm.watch import Watch, watch_world

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


def prepare(environment: MutableMapping[str, str]) -> None:
    """Set what torch and CUDA read when they start, where the user has not."""
    for name, value in ENVIRONMENT.items():
        environment.setdefault(name, value)


def backend(device: str) -> str:
    """Of a process group whose tensors lie on `device` ("cpu" or "cuda"); objects always travel over gloo."""
    return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"


def timeout(deadline: float, device: torch.device) -> timedelta:
    """Of process groups. gloo's is the deadline itself: its waits for messages cannot be cut short by anything else."""
    return timedelta(seconds=deadline + (LATER if device.type == "cuda" else 0.0))


def in_world(body: Callable[[Watch], int], deadline: float, device: torch.device) -> int:
    """Call `body` as one rank of those that the launcher started. Returns its exit code, or ends the process if it
    raises."""
    dist.init_process_group(backend(device.type), timeout=timeout(deadline, device))
    watch = watch_world(deadline, device)
    try:
        code = body(watch)
    except BaseException as error:
        watch.fail(error)
        raise
    watch.close()
    ending = Ending()
    ending.within(deadline)  # a communicator's destructor may wait for a rank that is gone
    dist.destroy_process_group()
    ending.postpone()
    return code
