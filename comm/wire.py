"""Stage-to-stage messages over torch.distributed, one communicator per channel.

A send is posted and forgotten until `drain`, a receive is posted as early as the schedule knows of it and waited for
when its op starts. One communicator for everything would be simpler and would let a late gradient hold up an activation
that is already there.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.api import Pending
from dryvine.comm.mesh import Channel, Mesh


class P2PWire:
    """A `Wire` on isend and irecv. Tensors that are sent must not be written to afterwards."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._leaving: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensors: tuple[Tensor, ...], target: int, channel: Channel) -> None:
        self._leaving = [(work, held) for work, held in self._leaving if not work.is_completed()]
        group, peer = self.mesh.channels[channel], self.mesh.global_rank(target)
        for tensor in tensors:
            held = tensor.contiguous()
            work = dist.isend(held, peer, group=group)
            assert work is not None
            self._leaving.append((work, held))

    def receive(self, like: tuple[Tensor, ...], source: int, channel: Channel) -> Pending[tuple[Tensor, ...]]:
        group, peer = self.mesh.channels[channel], self.mesh.global_rank(source)
        buffers = tuple(torch.empty(t.shape, dtype=t.dtype, device=self.mesh.device) for t in like)
        works = [dist.irecv(buffer, peer, group=group) for buffer in buffers]

        def finish() -> tuple[Tensor, ...]:
            for work in works:
                assert work is not None
                work.wait()
            return buffers

        return Pending(finish)

    def drain(self) -> None:
        for work, _ in self._leaving:
            work.wait()
        self._leaving.clear()
