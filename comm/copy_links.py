"""Memory that the GPUs of a node open to each other, and the streams that fill it: the parts of `CopyWire`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.copy_wire import Expect
from dryvine.comm.pending import Pending
from dryvine.comm.stream_values import copy_bytes, wait_values, write_values
from dryvine.comm.watch import Watch
from dryvine.comm.words import Words, on_all, share_words


class StreamQueue:
    """A `Queue` on a CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream, words: Words) -> None:
        self.stream, self.words = stream, words
        self._given = torch.cuda.Event()  # by the caller; one that is recorded anew each time is cheaper than a new one

    def after_caller(self) -> None:
        self._given.record(torch.cuda.current_stream(self.stream.device))
        self.stream.wait_event(self._given)

    def wait(self, words: Sequence[int], value: int) -> None:
        if value > 0:
            wait_values(self.stream, [self.words.address(word) for word in words], value)

    def copy(self, target: Tensor, source: Tensor) -> None:
        if source.is_contiguous() and target.is_contiguous():
            copy_bytes(self.stream, target.data_ptr(), source.data_ptr(), source.nbytes)
        else:
            with torch.cuda.stream(self.stream):
                target.copy_(source, non_blocking=True)

    def write(self, words: Sequence[int], value: int) -> None:
        write_values(self.stream, [self.words.address(word) for word in words], value)

    def here(self) -> Pending[None]:
        event = self.stream.record_event()
        return Pending(lambda: torch.cuda.current_stream().wait_event(event), event.query)


class DeviceLinks:
    """Symmetric memory (one buffer per rank, mapped by all) over NVLink or PCIe peer access.

    `mapping` keeps it mapped: views of it, which is what `memory` returns, do not.
    """

    def __init__(self, near: tuple[int, ...], mapping: NodeMemory, words: Words, device: torch.device) -> None:
        self.mapping, self.words, self.device = mapping, words, device
        self.memories = dict(zip(near, mapping.views, strict=True))

    def memory(self, rank: int) -> Tensor:
        return self.memories[rank]

    def queue(self) -> StreamQueue:
        return StreamQueue(torch.cuda.Stream(self.device), self.words)

    def caller(self) -> StreamQueue:
        return StreamQueue(torch.cuda.current_stream(self.device), self.words)


def open_links(
    near: tuple[int, ...], group: dist.ProcessGroup, size: int, words: int, device: torch.device
) -> DeviceLinks | None:
    """`size` bytes on each of the pipeline ranks `near`, those of `group`, open to all of them, and words that
    they share; None on all of them where any cannot have that (no peer access, a container that hides file descriptors,
    /dev/shm full). Collective over the group."""
    shared, own = share_words(group, words, device), _allocate(size, device)
    # First of all: in a rendezvous the others would wait long for one that has no memory for it.
    if not on_all(group, shared is not None and own is not None):
        return None
    assert shared is not None
    assert own is not None
    mapping = _rendezvous(group, own)
    if not on_all(group, mapping is not None):
        return None
    assert mapping is not None
    return DeviceLinks(near, mapping, shared, device)


def expecting(watch: Watch | None, words: Words) -> Expect:
    """Returns what notes waits for these words, and registers that all of them end when the process exits: the driver
    holds a process whose stream waits for most of a minute. All words, as a rank that was killed ends none itself."""
    if watch is None:
        return lambda *_: None
    watch.before_exit(lambda: words.fulfil(range(len(words.values))))
    return watch.expect


class NodeMemory(NamedTuple):
    """This rank's memory, torch's handle of all ranks' memories, and each as a uint8 tensor, by group rank."""

    own: Tensor
    handle: object
    views: list[Tensor]


def _allocate(size: int, device: torch.device) -> Tensor | None:
    import torch.distributed._symmetric_memory as symmetric

    try:
        return symmetric.empty(size, dtype=torch.uint8, device=device)
    except RuntimeError:  # too little memory, too
        return None


def _rendezvous(group: dist.ProcessGroup, own: Tensor) -> NodeMemory | None:
    import torch.distributed._symmetric_memory as symmetric

    try:
        handle = symmetric.rendezvous(own, group.group_name)
    except RuntimeError:
        return None
    return NodeMemory(own, handle, [handle.get_buffer(r, own.shape, torch.uint8) for r in range(group.size())])
