"""Gradients summed over every copy of a parameter, and the optimizer's state sharded over them (ZeRO-1).

A parameter's copies are wherever its global name is held: both ranks of a DualPipe stage, all data ranks (for an
expert, those with the same expert-parallel rank), and the ranks of the first and last stage for what MTP shares. So
the groups come from the names, which come from the schedule's routes, and no layout is a special case. Parameters with
the same copies share one flat bucket: its gradient is reduce-scattered, each rank updates its slice in FP32, and the
result is gathered in the parameters' own dtype. Every element of every gradient is then on exactly one rank, which
makes the global norm right in any layout: the sum of the slices' squares, each counted once.

The alternative, an optimizer over `.grad` with hooks (DDP, DeepSpeed), sees neither the two copies of a stage nor
gradients that a schedule defers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dryvine.comm.collectives import all_gather, reduce_scatter
from dryvine.comm.mesh import Mesh

NORM_PART = 1 << 24  # elements whose norm is taken at a time: 128 MiB in FP64


class Piece(NamedTuple):
    """A run of one parameter's elements that this rank owns, `start` counted in the whole parameter, all experts in."""

    name: str
    start: int
    master: Tensor  # FP32, a view of the bucket's shard
    grad: Tensor  # FP32, a view of the bucket's reduced gradient
    matrix: bool  # has two dimensions or more: weight decay applies


class Span(NamedTuple):
    """Where a piece is: `start` in the whole parameter, `inside` in its bucket's shard."""

    name: str
    start: int
    inside: slice
    matrix: bool


@dataclass
class Bucket:
    """Parameters with the same copies, flat. Sizes are padded to a multiple of the number of copies."""

    group: dist.ProcessGroup | None
    index: int  # this rank's place among the copies
    names: list[str]
    offsets: list[int]  # of each name, in the whole parameter (an expert slice does not start at 0)
    parameters: list[nn.Parameter]
    values: Tensor  # [padded], the parameters' dtype; they are views of it
    grads: Tensor  # [padded], FP32; their main_grads are views of it
    master: Tensor  # [padded / copies], FP32
    shard: Tensor  # [padded / copies], FP32: this rank's slice of the summed gradient; `grads` if there is one copy

    @property
    def first(self) -> int:
        """Where this rank's slice starts in the bucket."""
        return self.index * self.master.numel()

    def pieces(self) -> Iterator[Piece]:
        for name, start, inside, matrix in self.spans():
            yield Piece(name, start, self.master[inside], self.shard[inside], matrix)

    def spans(self) -> Iterator[Span]:
        """The pieces, as places in any tensor that is sharded like the master."""
        at = 0
        for name, offset, parameter in zip(self.names, self.offsets, self.parameters, strict=True):
            low = max(at, self.first)
            high = min(at + parameter.numel(), self.first + self.master.numel())
            if low < high:
                inside = slice(low - self.first, high - self.first)
                yield Span(name, offset + low - at, inside, parameter.dim() > 1)
            at += parameter.numel()


class Zero:
    """This rank's buckets. Made once from the parameters of all its stages; collective."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> None:
        self.mesh = mesh
        families = _families(parameters, mesh)
        groups = mesh.new_groups(sorted(set(families.values())))
        alike: dict[tuple[tuple[int, ...], torch.dtype], dict[str, nn.Parameter]] = {}
        for name, parameter in sorted(parameters.items()):
            ranks = families[name, mesh.ep_rank if _is_expert(parameter) else None]
            alike.setdefault((ranks, parameter.dtype), {})[name] = parameter
        self.buckets = [
            _bucket(some, ranks, groups.get(ranks), mesh) for (ranks, _), some in sorted(alike.items(), key=_key)
        ]

    def pieces(self) -> Iterable[Piece]:
        """What this rank owns of every parameter. Over all ranks, each element is owned once."""
        return (piece for bucket in self.buckets for piece in bucket.pieces())

    def zero_grads(self) -> None:
        for bucket in self.buckets:
            bucket.grads.zero_()

    def reduce(self) -> None:
        """Sum the gradients over all copies; each rank keeps the slice it owns."""
        for bucket in self.buckets:
            if bucket.group is not None:
                reduce_scatter(bucket.shard, bucket.grads, bucket.group)

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole gradient, every parameter counted once. Call after `reduce`; a scalar, FP64.

        By torch's kernel for lists, which sums FP32 numbers in FP64: `vector_norm` makes an FP64 copy first, twice the
        gradients' memory. On a CPU there is only that, a part at a time.
        """
        parts = [part for bucket in self.buckets for part in bucket.shard.split(NORM_PART)]
        norms = torch.stack(torch._foreach_norm(parts, 2.0, dtype=torch.float64))
        return self.mesh.sum(norms.square().sum()).sqrt()

    def publish(self, shards: Sequence[Tensor] | None = None) -> None:
        """Give every copy the new values, from the FP32 masters of their owners, or from `shards`, one a bucket."""
        for i, bucket in enumerate(self.buckets):
            own = bucket.values[bucket.first : bucket.first + bucket.master.numel()]
            own.copy_(bucket.master if shards is None else shards[i])
            if bucket.group is not None:
                all_gather(bucket.values, own.clone(), bucket.group)


def _families(parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> dict[tuple[str, int | None], tuple[int, ...]]:
    """(name, ep rank for an expert's slice) -> the world ranks that hold a copy."""
    held = mesh.gather([(name, _is_expert(p)) for name, p in parameters.items()])
    homes: dict[tuple[str, bool], set[int]] = {}
    for rank, names in enumerate(held):
        for key in names:  # type: ignore[attr-defined]
            homes.setdefault(key, set()).add(rank // mesh.data_ranks)
    return {
        (name, ep): mesh.ranks(homes[name, expert], ep)
        for name, expert in sorted(homes)
        for ep in (range(mesh.ep) if expert else (None,))
    }


def _bucket(
    parameters: dict[str, nn.Parameter], ranks: tuple[int, ...], group: dist.ProcessGroup | None, mesh: Mesh
) -> Bucket:
    size = sum(p.numel() for p in parameters.values())
    share = -(-size // len(ranks))
    some = next(iter(parameters.values()))
    values = torch.zeros(share * len(ranks), dtype=some.dtype, device=some.device)
    grads = torch.zeros(share * len(ranks), dtype=torch.float32, device=some.device)
    at = 0
    for parameter in parameters.values():
        place = slice(at, at + parameter.numel())
        values[place] = parameter.detach().flatten()
        parameter.data = values[place].view(parameter.shape)
        parameter.main_grad = grads[place].view(parameter.shape)  # type: ignore[attr-defined]
        at = place.stop
    offsets = [mesh.ep_rank * p.numel() if _is_expert(p) else 0 for p in parameters.values()]
    bucket = Bucket(
        group, ranks.index(mesh.rank), list(parameters), offsets, list(parameters.values()), values, grads,
        master=torch.zeros(share, dtype=torch.float32, device=some.device),
        shard=grads if group is None else torch.zeros(share, dtype=torch.float32, device=some.device),
    )  # fmt: skip
    bucket.master.copy_(values[bucket.first : bucket.first + share])
    return bucket


def _is_expert(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "expert", False)


def _key(item: tuple[tuple[tuple[int, ...], torch.dtype], object]) -> str:
    """The same order of buckets on every rank, since each is a collective."""
    return str(item[0])
