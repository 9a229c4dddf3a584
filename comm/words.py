"""Words shared by several processes of a node: how far each has come, for hosts and devices to read.

They are a file in /dev/shm, mapped by every rank of a group and, on a GPU, pinned, so that streams can wait for the
words and write them (`stream_values`). In device memory a wait would be as cheap, but a host could neither see what a
device waits for nor release the wait of a process that must exit.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dryvine.comm.stream_values import map_host_memory

FULFILLED = 1 << 30  # at least any number that is waited for


class Words:
    """`count` int32 words, zero at first. `address(i)` is where a device finds word i; 0 on a CPU."""

    def __init__(self, file: Path, count: int, device: torch.device) -> None:
        with file.open("r+b") as opened:
            self._memory = mmap.mmap(opened.fileno(), count * 4)
        self.values = np.frombuffer(self._memory, np.int32)
        on_device = device.type == "cuda"
        self._base = map_host_memory(self.values, self) if on_device else 0

    def address(self, index: int) -> int:
        return self._base + 4 * index

    def reached(self, index: int, value: int) -> bool:
        """Whether a wait for `value` would return now."""
        return int(self.values[index]) >= value

    def fulfil(self, indices: Sequence[int]) -> None:
        """Release every wait for these words, now and later. Only for a job that ends: the awaited data is not
        there."""
        self.values[list(indices)] = FULFILLED


def share_words(group: dist.ProcessGroup, count: int, device: torch.device) -> Words | None:
    """Words for all ranks of `group`; None on all of them if any cannot map the file: it is on another node, or there
    is no shared memory. Collective over the group."""
    first = dist.get_rank(group) == 0
    file = _create(count) if first else None
    names = [str(file)]
    dist.broadcast_object_list(names, group=group, group_src=0)
    words = _open(Path(names[0]), count, device)
    mapped = on_all(group, words is not None)
    if file:
        file.unlink()  # the mappings stay
    return words if mapped else None


def on_all(group: dist.ProcessGroup, fine: bool) -> bool:
    """Whether it is on all ranks of `group`. Collective over it."""
    everyone: list[bool] = [False] * dist.get_world_size(group)
    dist.all_gather_object(everyone, fine, group=group)
    return all(everyone)


def _create(count: int) -> Path | None:
    try:
        number, name = tempfile.mkstemp(prefix="dryvine-words-", dir="/dev/shm")
        # Allocated now: a sparse file in a full /dev/shm would end the process at its first write.
        os.posix_fallocate(number, 0, count * 4)
        os.close(number)
    except OSError:
        return None
    return Path(name)


def _open(file: Path, count: int, device: torch.device) -> Words | None:
    try:
        return Words(file, count, device)
    except (OSError, ValueError, RuntimeError):  # absent here, of another size, or not to be pinned
        return None
