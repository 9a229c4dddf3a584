"""A flat bucket: parameters that have the same copies, their gradients, and this rank's shard of the state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dryvine.comm.collectives import all_gather, exchange, reduce_scatter
from dryvine.comm.groups import GroupsByRanks
from dryvine.comm.mesh import Mesh
from dryvine.comm.pending import Pending
from dryvine.comm.watch import Watch
from dryvine.parallel.buckets import BucketLayout
from dryvine.parallel.host_copy import HostCopies

Sums = Literal["fp32", "bf16"]


class Piece(NamedTuple):
    """The elements of one parameter that this rank owns: neighbours in it, and in the bucket's shard."""

    name: str
    start: int  # the first, counted in the whole parameter, all experts in
    in_shard: slice  # where they are in any tensor that is sharded like the master
    master: Tensor  # FP32, a view of the bucket's master
    grad: Tensor  # FP32, a view of the bucket's summed gradient, where the master is
    shape: tuple[int, ...]  # of the whole parameter, all experts in

    @property
    def matrix(self) -> bool:
        """Two dimensions or more: weight decay applies."""
        return len(self.shape) > 1


class ShardSpan(NamedTuple):
    """The elements of one parameter in a shard of a bucket, whoever owns that."""

    name: str
    start: int  # the first, counted in the whole parameter, all experts in
    in_shard: slice
    shape: tuple[int, ...]  # of the whole parameter


class Member(NamedTuple):
    """A parameter in a bucket, of which it is a view, and so is its gradient."""

    name: str
    first: int  # its first element, counted in the whole parameter: an expert slice does not start at 0
    shape: tuple[int, ...]  # of the whole parameter
    parameter: nn.Parameter
    grad: Tensor  # FP32, in the parameter's shape: its `main_grad`


@dataclass
class Bucket:
    """Parameters with the same copies, flat, with zeros where the layout has padding.

    `sums` is the dtype in which gradients travel. With "bf16" a rank rounds its own once and sends each owner its
    shard; the owner adds them in FP32, its own unrounded, in rank order. A reduce-scatter in BF16 would round at every
    hop.
    """

    layout: BucketLayout
    group: dist.ProcessGroup | None  # of the copies; None if there is one
    index: int  # this rank's place among the copies
    sums: Sums
    members: list[Member]
    values: Tensor  # [padded], the parameters' dtype
    grads: Tensor  # [padded], FP32: of this rank's microbatches
    grad_shard: Tensor  # [padded / copies], FP32: this rank's shard of the summed `grads`; `grads` if there is one copy
    master: Tensor  # [padded / copies], FP32: this rank's shard of the values
    grad: Tensor  # `grad_shard` where the master is: itself, or a copy in host memory
    host: HostCopies | None = None  # where masters are in host memory

    @property
    def copies(self) -> int:
        return self.group.size() if self.group else 1

    @property
    def own(self) -> slice:
        """This rank's shard, as a part of the bucket."""
        return self._shard(self.index)

    def _shard(self, index: int) -> slice:
        size = self.master.numel()
        return slice(index * size, (index + 1) * size)

    def matrices(self, index: int) -> int:
        """How many of the first elements of the shard of copy `index` are of matrices, padding included; vectors
        follow."""
        return min(max(self.layout.vectors - self._shard(index).start, 0), self.master.numel())

    def spans(self, index: int) -> Iterator[ShardSpan]:
        """What is in the shard of copy `index`."""
        members = {member.name: member for member in self.members}
        for name, start, inside in self.layout.spans(index, self.master.numel()):
            yield ShardSpan(name, members[name].first + start, inside, members[name].shape)

    def pieces(self) -> Iterator[Piece]:
        for name, start, inside, shape in self.spans(self.index):
            yield Piece(name, start, inside, self.master[inside], self.grad[inside], shape)

    def sum(self, watch: Watch | None, what: str) -> Pending[None]:
        """Start to sum `grads` over the copies, each rank its shard, and to copy that to where the master is."""
        summed = self._sum(watch, what)
        return self.host.fetch(summed, self.grad_shard, self.grad) if self.host else summed

    def _sum(self, watch: Watch | None, what: str) -> Pending[None]:
        if self.group is None:
            return Pending.done(None)
        if self.sums == "bf16":
            return self._sum_rounded(self.group, watch, what)
        posted = reduce_scatter(self.grad_shard, self.grads, self.group, watch, what)
        return Pending(lambda: posted.wait(whole=False), posted.ready)

    def _sum_rounded(self, group: dist.ProcessGroup, watch: Watch | None, what: str) -> Pending[None]:
        sent = self.grads.bfloat16()
        arrived = torch.empty_like(sent)
        posted = exchange(arrived, sent, group, watch, what)

        def add() -> None:
            posted.wait(whole=False)
            parts = list(arrived.view(group.size(), -1))
            parts[self.index] = self.grads[self.own]
            self.grad_shard.copy_(parts[0])
            for part in parts[1:]:
                self.grad_shard.add_(part)

        return Pending(add, posted.ready)

    def put(self, shard: Tensor) -> None:
        """Set this rank's shard of the values, from FP32 [padded / copies]."""
        if self.host:
            self.host.put(shard, self.values[self.own])
        else:
            self.values[self.own].copy_(shard)

    def send(self, watch: Watch | None, what: str) -> Pending[None]:
        """Start to set the values of every copy to all ranks' shards of the values."""
        if self.group is None:
            return Pending.done(None)
        own = self.values[self.own]
        # NCCL gathers in place; gloo's input may not be a part of its output.
        posted = all_gather(self.values, own if own.is_cuda else own.clone(), self.group, watch, what)
        return Pending(lambda: posted.wait(whole=False), posted.ready)


@dataclass(frozen=True)
class BucketMemory:
    """How buckets are made: the dtype in which gradients are summed, and whether masters are in host memory."""

    sums: Sums = "fp32"
    offload: bool = False


ON_DEVICE = BucketMemory()


def make_bucket(
    layout: BucketLayout,
    parameters: Mapping[str, nn.Parameter],
    groups: GroupsByRanks,
    mesh: Mesh,
    memory: BucketMemory,
) -> Bucket:
    """Move the parameters of a layout into a bucket."""
    ranks = mesh.ranks(*layout.copies)
    like, size = parameters[next(iter(layout.starts))], layout.padded(len(ranks))
    values = torch.zeros(size, dtype=like.dtype, device=like.device)
    grads = torch.zeros(size, dtype=torch.float32, device=like.device)
    shard = grads if len(ranks) == 1 else grads.new_zeros(size // len(ranks))
    host = HostCopies(like.device) if memory.offload else None
    master, grad = (host.empty(shard), host.empty(shard)) if host else (torch.zeros_like(shard), shard)
    bucket = Bucket(
        layout, groups.get(ranks), ranks.index(mesh.rank), memory.sums, [], values, grads, shard, master, grad, host
    )
    for name, at in layout.starts.items():
        bucket.members.append(_move(name, parameters[name], bucket, at, mesh))
    master.copy_(values[bucket.own])
    return bucket


def _move(name: str, parameter: nn.Parameter, bucket: Bucket, at: int, mesh: Mesh) -> Member:
    """Move a parameter into a bucket, to element `at`, and make its `main_grad` a view too."""
    place = slice(at, at + parameter.numel())
    bucket.values[place] = parameter.detach().flatten()
    parameter.data = bucket.values[place].view(parameter.shape)
    grad = bucket.grads[place].view(parameter.shape)
    parameter.main_grad = grad  # type: ignore[attr-defined]
    if not is_expert(parameter):
        return Member(name, 0, tuple(parameter.shape), parameter, grad)
    experts, *of_one = parameter.shape
    return Member(name, mesh.ep_rank * parameter.numel(), (mesh.ep * experts, *of_one), parameter, grad)


def is_expert(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "expert", False)
