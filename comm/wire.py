"""Stage-to-stage messages over torch.distributed, one communicator per channel.

A send is posted and its tensors held until they have left; a receive is posted as early as the schedule knows of it and
waited for when its op starts. One communicator for everything would be simpler and would let a late gradient hold up an
activation that is already there.
"""

from __future__ import annotations

from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.lines import Channel
from dryvine.comm.mesh import Mesh
from dryvine.comm.pending import Pending
from dryvine.comm.posted import Posted

NAMES = {"down": "activations", "up": "gradients"}


class Wire(Protocol):
    """Stage-to-stage messages of one pipeline. A channel is (route, direction) and FIFO between each two ranks."""

    def send(
        self, tensors: tuple[Tensor, ...], target: int, channel: tuple[int, str], label: str = ""
    ) -> Pending[None]:
        """Start sending to pipeline rank `target`; the Pending holds the tensors until they have left. `label` says
        in errors whose tensors they are (stage, microbatch)."""
        ...

    def receive(
        self, like: tuple[Tensor, ...], source: int, channel: tuple[int, str], label: str = ""
    ) -> Pending[tuple[Tensor, ...]]:
        """Post a receive of tensors shaped as `like` (meta tensors will do)."""
        ...


class ReceiveBuffers:
    """Receive buffers that are reused as soon as no tensor refers to their memory. Asking the storage, not the
    schedule, makes reuse safe whatever a stage does with its input: saves it for W, passes it on, sends it. As many
    blocks are kept as were ever in use at once, which the schedule determines (see `Executor`). On a CPU a fresh
    `torch.empty` per message pages in its memory each time: five times the cost, for a state of V3's size (4096 x
    7168, BF16)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks: list[tuple[Tensor, torch.UntypedStorage]] = []  # uint8, and its memory

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised tensor of the shape and dtype of `like`."""
        size = prod(like.shape) * like.element_size()
        block = next((b for b, memory in self.blocks if _unused(memory) and b.numel() >= size), None)
        return (self._grow(size) if block is None else block)[:size].view(like.dtype).view(like.shape)

    def _grow(self, size: int) -> Tensor:
        """One more block, in place of a free one if there is one, which must have been too small."""
        small = next((i for i, (_, memory) in enumerate(self.blocks) if _unused(memory)), len(self.blocks))
        block = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.blocks[small : small + 1] = [(block, block.untyped_storage())]
        return block


def _unused(memory: torch.UntypedStorage) -> bool:
    """Whether nothing else refers to it than `blocks`: the tensor, and the storage beside it."""
    return torch._C._storage_Use_Count(memory._cdata) == 2


class P2PWire:
    """A `Wire` on isend and irecv. Tensors that are sent must not be written to afterwards.

    With the mesh's watch each has its deadline, and a lost connection raises CommError with the culprit.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.buffers = ReceiveBuffers(mesh.device)

    def send(self, tensors: tuple[Tensor, ...], target: int, channel: Channel, label: str = "") -> Pending[None]:
        group, peer = self.mesh.channels[channel, target > self.mesh.pp_rank], self.mesh.global_rank(target)
        what = f"sending {describe(channel, label)} to rank {peer}"
        held = [tensor.contiguous() for tensor in tensors]

        def post() -> list[dist.Work | None]:
            return [dist.isend(tensor, peer, group=group) for tensor in held]

        posted = Posted(self.mesh.watch, what, ((peer, 0),), post, self.mesh.device.type == "cuda")

        def finish() -> None:
            posted.wait()
            held.clear()

        return Pending(finish, posted.ready)

    def receive(
        self, like: tuple[Tensor, ...], source: int, channel: Channel, label: str = ""
    ) -> Pending[tuple[Tensor, ...]]:
        group, peer = self.mesh.channels[channel, source < self.mesh.pp_rank], self.mesh.global_rank(source)
        buffers = tuple(self.buffers.take(t) for t in like)
        what = f"receiving {describe(channel, label)}"
        due = ((peer, sum(buffer.nbytes for buffer in buffers)),)

        def post() -> list[dist.Work | None]:
            return [dist.irecv(buffer, peer, group=group) for buffer in buffers]

        posted = Posted(self.mesh.watch, what, due, post, self.mesh.device.type == "cuda")

        def finish() -> tuple[Tensor, ...]:
            posted.wait()
            return buffers

        return Pending(finish)


def describe(channel: Channel, label: str) -> str:
    """A message, for errors."""
    return f"{NAMES[channel[1]]} of route {channel[0]}" + (f", {label}" if label else "")
