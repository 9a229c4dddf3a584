"""Links of a `CopyWire` between processes on CPUs: memory and words in shared files, a thread for each queue. Waits and
writes take effect in the order of a queue and at no other time, as on a stream; `slow` seconds before each copy play a
link that is late."""

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.pending import Pending
from dryvine.comm.words import Words

CPU = torch.device("cpu")


class HostQueue:
    def __init__(self, words: Words, slow: float = 0.0) -> None:
        self.words, self.slow = words, slow
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] = self._thread.submit(lambda: None)

    def after_caller(self) -> None:
        """The caller's work is done when it queues: a CPU has no streams."""

    def wait(self, words: Sequence[int], value: int) -> None:
        def poll() -> None:
            while not all(self.words.reached(word, value) for word in words):
                time.sleep(1e-4)

        self._put(poll)

    def copy(self, target: Tensor, source: Tensor) -> None:
        def late() -> None:
            time.sleep(self.slow)
            target.copy_(source)

        self._put(late)

    def write(self, words: Sequence[int], value: int) -> None:
        self._put(lambda: self.words.values.__setitem__(list(words), value))

    def here(self) -> Pending[None]:
        return Pending(self._last.result, self._last.done)

    def _put(self, run: Callable[[], None]) -> None:
        self._last = self._thread.submit(run)


class Caller(HostQueue):
    """The caller's own stream: on a CPU each call is done when it returns."""

    def _put(self, run: Callable[[], None]) -> None:
        run()


class HostLinks:
    """`folder` is shared by the `ranks` of one pipeline and has room for their memories, of `size` bytes each."""

    def __init__(self, folder: Path, ranks: int, size: int, words: int, slow: float = 0.0) -> None:
        self.words, self.slow = Words(folder / "words", words, CPU), slow
        with (folder / "memory").open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), ranks * size)
        self._memory = torch.frombuffer(mapped, dtype=torch.uint8).view(ranks, size)

    def memory(self, rank: int) -> Tensor:
        return self._memory[rank]

    def queue(self) -> HostQueue:
        return HostQueue(self.words, self.slow)

    def caller(self) -> HostQueue:
        return Caller(self.words)


def make_room(folder: Path, ranks: int, size: int, words: int) -> None:
    """The files that `HostLinks` maps."""
    for name, length in (("memory", ranks * size), ("words", 4 * words)):
        with (folder / name).open("wb") as file:
            file.truncate(length)


def open_host_links(
    folder: Path, near: tuple[int, ...], group: dist.ProcessGroup, size: int, words: int, device: torch.device
) -> HostLinks:
    """In place of `copy_links.open_links` on CPUs. Collective over the group."""
    names = [""]
    if dist.get_rank(group) == 0:
        names = [tempfile.mkdtemp(dir=folder)]
        make_room(Path(names[0]), len(near), size, words)
    dist.broadcast_object_list(names, group=group, group_src=0)
    return HostLinks(Path(names[0]), len(near), size, words)
