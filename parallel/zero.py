"""Gradients summed over every copy of a parameter, and the optimizer's state sharded over them (ZeRO-1).

A parameter's copies are wherever its global name is held: both ranks of a DualPipe stage, all data ranks (for an
expert, those with the same expert-parallel rank), and the ranks of the first and last stage for what MTP shares. So
the groups come from the names, which come from the schedule's routes, and no layout is a special case. Parameters with
the same copies share one flat bucket: its gradient is reduce-scattered, each rank updates its shard in FP32, and the
result is gathered in the parameters' own dtype. Every element of every gradient is then on exactly one rank, which
makes the global norm right in any layout: the sum of the shards' squares, each counted once.

The alternative, an optimizer over `.grad` with hooks (DDP, DeepSpeed), sees neither the two copies of a stage nor
gradients that a schedule defers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dryvine.comm.collectives import all_gather, reduce_scatter
from dryvine.comm.integers import round_up
from dryvine.comm.mesh import Mesh
from dryvine.comm.watch import Watch

NORM_PART = 1 << 24  # elements whose norm is taken at a time: 128 MiB in FP64
Ranks = tuple[int, ...]  # world ranks, ascending


class Piece(NamedTuple):
    """The elements of one parameter that this rank owns: neighbours in it, and in the bucket's shard."""

    name: str
    start: int  # the first, counted in the whole parameter, all experts in
    in_shard: slice  # where they are in any tensor that is sharded like the master
    master: Tensor  # FP32, a view of the bucket's master
    grad: Tensor  # FP32, a view of the bucket's summed gradient
    shape: tuple[int, ...]  # of the whole parameter, all experts in

    @property
    def matrix(self) -> bool:
        """Two dimensions or more: weight decay applies."""
        return len(self.shape) > 1


class Member(NamedTuple):
    """A parameter in a bucket, of which it is a view, and so is its gradient."""

    name: str
    first: int  # its first element, counted in the whole parameter: an expert slice does not start at 0
    shape: tuple[int, ...]  # of the whole parameter
    parameter: nn.Parameter
    grad: Tensor  # FP32, in the parameter's shape: its `main_grad`


@dataclass
class Bucket:
    """Parameters with the same copies, flat: one after the other, then zeros up to a multiple of the copies' number."""

    group: dist.ProcessGroup | None  # of the copies; None if there is one
    index: int  # this rank's place among the copies
    members: list[Member]
    values: Tensor  # [padded], the parameters' dtype
    grads: Tensor  # [padded], FP32: of this rank's microbatches
    master: Tensor  # [padded / copies], FP32: this rank's shard of the values
    grad_shard: Tensor  # [padded / copies], FP32: this rank's shard of the summed `grads`; `grads` if there is one copy

    @property
    def own(self) -> slice:
        """This rank's shard, as a part of the bucket."""
        size = self.master.numel()
        return slice(self.index * size, (self.index + 1) * size)

    def pieces(self) -> Iterator[Piece]:
        own, at = self.own, 0
        for name, first, shape, parameter, _ in self.members:
            end = at + parameter.numel()
            low, high = max(at, own.start), min(end, own.stop)
            if low < high:
                inside = slice(low - own.start, high - own.start)
                master, grad = self.master[inside], self.grad_shard[inside]
                yield Piece(name, first + low - at, inside, master, grad, shape)
            at = end

    def reduce(self, watch: Watch | None, what: str) -> None:
        """Sum `grads` over the copies, each rank its shard."""
        if self.group is not None:
            reduce_scatter(self.grad_shard, self.grads, self.group, watch, what)

    def publish(self, shard: Tensor, watch: Watch | None, what: str) -> None:
        """Set the values of every copy from the shards of all of them, FP32 [padded / copies]."""
        own = self.values[self.own]
        own.copy_(shard)
        if self.group is not None:
            all_gather(self.values, own.clone(), self.group, watch, what)


class Zero:
    """This rank's buckets. Made once from the parameters of all its stages, which become views of them; collective."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> None:
        self.mesh = mesh
        copies = _copies(parameters, mesh)
        groups = mesh.new_groups(sorted(set(copies.values())))
        alike: defaultdict[tuple[Ranks, torch.dtype], dict[str, nn.Parameter]] = defaultdict(dict)
        for name, parameter in sorted(parameters.items()):
            ranks = copies[name, mesh.ep_rank if _is_expert(parameter) else None]
            alike[ranks, parameter.dtype][name] = parameter
        # Each bucket is a collective, so they come in the same order on every rank.
        kinds = sorted(alike, key=str)
        self.buckets = [_bucket(alike[ranks, dtype], ranks, groups.get(ranks), mesh) for ranks, dtype in kinds]

    def pieces(self) -> Iterator[Piece]:
        """What this rank owns of every parameter. Over all ranks, each element is owned once."""
        return (piece for bucket in self.buckets for piece in bucket.pieces())

    def zero_grads(self) -> None:
        """Set this rank's gradients to zero, ready for a step."""
        for bucket in self.buckets:
            bucket.grads.zero_()

    def reduce(self) -> None:
        """Sum the gradients over all copies; each rank keeps the shard it owns."""
        for number, bucket in enumerate(self.buckets):
            bucket.reduce(self.mesh.watch, f"sum of the gradients of bucket {number}")

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole gradient, every parameter counted once. Call after `reduce`; a scalar, FP64.

        By torch's kernel for lists, which sums FP32 numbers in FP64: `vector_norm` makes an FP64 copy first, twice the
        gradients' memory. On a CPU there is only that, a part at a time.
        """
        parts = [part for bucket in self.buckets for part in bucket.grad_shard.split(NORM_PART)]
        norms = torch.stack(torch._foreach_norm(parts, 2.0, dtype=torch.float64))
        return self.mesh.sum(norms.square().sum(), "gradient norms").sqrt()

    def publish(self, shards: Sequence[Tensor] | None = None) -> None:
        """Give every copy the new values, from the FP32 masters of their owners, or from `shards`, one per bucket."""
        values = shards or [bucket.master for bucket in self.buckets]
        for number, (bucket, shard) in enumerate(zip(self.buckets, values, strict=True)):
            bucket.publish(shard, self.mesh.watch, f"gathering the weights of bucket {number}")


def _copies(parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> dict[tuple[str, int | None], Ranks]:
    """(name, and the ep rank for an expert's slice) -> the world ranks that hold a copy. Collective."""
    own = [(name, _is_expert(parameter)) for name, parameter in parameters.items()]
    every = cast(list[list[tuple[str, bool]]], mesh.gather(own, "parameter names"))
    homes: defaultdict[tuple[str, bool], set[int]] = defaultdict(set)  # pipeline ranks
    for rank, held in enumerate(every):
        for key in held:
            homes[key].add(rank // mesh.data_ranks)
    return {
        (name, ep): mesh.ranks(homes[name, expert], ep)
        for name, expert in sorted(homes)
        for ep in (range(mesh.ep) if expert else (None,))
    }


def _bucket(
    parameters: Mapping[str, nn.Parameter], ranks: Ranks, group: dist.ProcessGroup | None, mesh: Mesh
) -> Bucket:
    """Move parameters of one dtype and device into a bucket."""
    like = next(iter(parameters.values()))
    size = round_up(sum(p.numel() for p in parameters.values()), len(ranks))
    values = torch.zeros(size, dtype=like.dtype, device=like.device)
    grads, master = (torch.zeros(n, dtype=torch.float32, device=like.device) for n in (size, size // len(ranks)))
    shard = grads if group is None else torch.zeros_like(master)
    bucket = Bucket(group, ranks.index(mesh.rank), [], values, grads, master, shard)
    at = 0
    for name, parameter in parameters.items():
        bucket.members.append(_move(name, parameter, bucket, at, mesh))
        at += parameter.numel()
    master.copy_(values[bucket.own])
    return bucket


def _move(name: str, parameter: nn.Parameter, bucket: Bucket, at: int, mesh: Mesh) -> Member:
    """Move a parameter into a bucket, to element `at`, and make its `main_grad` a view too."""
    place = slice(at, at + parameter.numel())
    bucket.values[place] = parameter.detach().flatten()
    parameter.data = bucket.values[place].view(parameter.shape)
    grad = bucket.grads[place].view(parameter.shape)
    parameter.main_grad = grad  # type: ignore[attr-defined]
    if not _is_expert(parameter):
        return Member(name, 0, tuple(parameter.shape), parameter, grad)
    experts, *of_one = parameter.shape
    return Member(name, mesh.ep_rank * parameter.numel(), (mesh.ep * experts, *of_one), parameter, grad)


def _is_expert(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "expert", False)
