"""Gradients summed over every copy of a parameter, and the optimizer's state sharded over them (ZeRO-1).

A parameter's copies are wherever its global name is held: both ranks of a DualPipe stage, all data ranks (for an
expert, those with the same expert-parallel rank), and the ranks of the first and last stage for what MTP shares. So
the groups come from the names, which come from the schedule's routes, and no layout is a special case. Parameters with
the same copies share flat buckets (`buckets.py`): a bucket's gradient is reduce-scattered, each rank updates its shard
in FP32, and the result is gathered in the parameters' own dtype. Every element of every gradient is then on exactly one
rank, which makes the global norm right in any layout: the sum of the shards' squares, each counted once.

Nothing of this stands alone at the end of a step. A bucket's sum begins when its last gradient has been added, while
the pipeline's tail still runs, and the new weights of a layer are waited for when a forward first reads them.

The alternative, an optimizer over `.grad` with hooks (DDP, DeepSpeed), sees neither the two copies of a stage nor
gradients that a schedule defers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dryvine.comm.mesh import Mesh
from dryvine.comm.pending import Pending
from dryvine.parallel.bucket import ON_DEVICE, BucketMemory, Piece, is_expert, make_bucket
from dryvine.parallel.buckets import BucketEntry, BucketTurns, Holders, ReadingLayer, layouts, turns
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.stalls import Stalls

NORM_PART = 1 << 24  # elements whose norm is taken at a time: 128 MiB in FP64
ANYWHERE = (ReadingLayer(0, 0, "all"),)  # of parameters whose layers nobody has told


class Zero:
    """This rank's buckets. Made once from the parameters of all its stages, which become views of them; collective.

    In a step: `begin`, then `summed` for each layer while the schedule runs, `reduce`, the update of the masters,
    `send`, and in the next step `need` before a layer is read. All ranks must begin with the same turns.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mesh: Mesh,
        readers: Mapping[str, tuple[ReadingLayer, ...]] | None = None,
        memory: BucketMemory = ON_DEVICE,
    ) -> None:
        """`readers` are this rank's layers that read each parameter; without, all parameters are one layer's."""
        self.mesh = mesh
        self.stalls = Stalls(mesh.device)
        own = readers or dict.fromkeys(parameters, ANYWHERE)
        held, world = _held(parameters, own, mesh)
        groups = mesh.new_groups(sorted({mesh.ranks(*held) for held in world}), mesh.sms)
        made = layouts(_entry(name, parameter, *held[name]) for name, parameter in parameters.items())
        self.buckets = [make_bucket(layout, parameters, groups, mesh, memory) for layout in made]
        self._layers = [frozenset(r.layer for name in layout.starts for r in own[name]) for layout in made]
        self._turns = BucketTurns(tuple(range(len(made))), tuple(range(len(made))))
        self._unsummed = [set(of) for of in self._layers]  # layers whose gradients are not complete, of each bucket
        self._to_sum = list(self._turns.sums)
        self._sums: dict[int, Pending[None]] = {}
        self._gathers: dict[int, Pending[None]] = {}

    def pieces(self) -> Iterator[Piece]:
        """What this rank owns of every parameter. Over all ranks, each element is owned once."""
        return (piece for bucket in self.buckets for piece in bucket.pieces())

    @property
    def gathers_turn(self) -> Sequence[int]:
        """The numbers of the buckets in the order in which their new weights are needed."""
        return self._turns.gathers

    def zero_grads(self) -> None:
        """Set this rank's gradients to zero, ready for a step."""
        for bucket in self.buckets:
            bucket.grads.zero_()

    # -- sums

    def turns(self, schedule: Schedule) -> BucketTurns:
        """The turns of this rank's buckets in a schedule."""
        return turns(schedule, [bucket.layout for bucket in self.buckets])

    def begin(self, turns: BucketTurns) -> None:
        """Start of a schedule in which `summed` will be called for layers; sums and gathers follow these turns."""
        self._turns, self._to_sum = turns, list(turns.sums)
        self._unsummed = [set(layers) for layers in self._layers]

    def summed(self, layer: str) -> None:
        """The last gradient of the step has been added to the layer's weights, in the current stream. Begins the sums
        of the buckets that are complete, as far as their turns have come."""
        for missing in self._unsummed:
            missing.discard(layer)
        while self._to_sum and not self._unsummed[self._to_sum[0]]:
            self._begin_sum(self._to_sum.pop(0))

    def reduce(self) -> None:
        """Sum the gradients over all copies; each rank keeps the shard it owns. Begins what has not begun, and waits
        for all."""
        for number in self._to_sum:
            self._begin_sum(number)
        self._to_sum = list(self._turns.sums)
        with self.stalls.noted():
            for number in list(self._sums):
                self._sums.pop(number).wait()

    def _begin_sum(self, number: int) -> None:
        bucket = self.buckets[number]
        self._sums[number] = bucket.sum(self.mesh.watch, f"sum of the gradients of {bucket.layout.name}")

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole gradient, every parameter counted once. Call after `reduce`; a scalar, FP64.

        By torch's kernel for lists, which sums FP32 numbers in FP64: `vector_norm` makes an FP64 copy first, twice the
        gradients' memory. On a CPU there is only that, a part at a time.
        """
        parts = [part for bucket in self.buckets for part in bucket.grad_shard.split(NORM_PART)]
        norms = torch.stack(torch._foreach_norm(parts, 2.0, dtype=torch.float64))
        return self.mesh.sum(norms.square().sum(), "gradient norms").sqrt()

    # -- new weights

    def send(self, number: int, shard: Tensor | None = None) -> None:
        """Start to give every copy of a bucket its new values, from the FP32 masters of their owners or from
        `shard`. All ranks send in the order of `gathers_turn`."""
        bucket = self.buckets[number]
        values = bucket.master if shard is None else shard
        self._settle(number)
        self._gathers[number] = bucket.send(values, self.mesh.watch, f"gathering the weights of {bucket.layout.name}")

    def need(self, layer: str) -> None:
        """Wait, in the current stream, until the layer's weights are the new ones."""
        for number in [number for number in self._gathers if layer in self._layers[number]]:
            self._settle(number)

    def settle(self) -> None:
        """Wait until all weights are the new ones, for readers outside a forward."""
        for number in list(self._gathers):
            self._settle(number)

    def publish(self, shards: Sequence[Tensor] | None = None) -> None:
        """`send` all buckets, from the masters or from `shards`, one per bucket, and `settle`."""
        for number in self._turns.gathers:
            self.send(number, shards[number] if shards else None)
        self.settle()

    def _settle(self, number: int) -> None:
        if number in self._gathers:
            with self.stalls.noted():
                self._gathers.pop(number).wait()


HoldersAndReaders = tuple[Holders, tuple[ReadingLayer, ...]]  # of a parameter, over all ranks


def _held(
    parameters: Mapping[str, nn.Parameter], readers: Mapping[str, tuple[ReadingLayer, ...]], mesh: Mesh
) -> tuple[dict[str, HoldersAndReaders], set[Holders]]:
    """Who holds each parameter of the world, for this rank's parameters. Collective."""
    own = [(name, is_expert(parameter), readers[name]) for name, parameter in parameters.items()]
    every = cast(list[list[tuple[str, bool, tuple[ReadingLayer, ...]]]], mesh.gather(own, "parameter names"))
    homes: defaultdict[tuple[str, bool], set[int]] = defaultdict(set)  # pipeline ranks
    reading: defaultdict[str, set[ReadingLayer]] = defaultdict(set)
    for rank, held in enumerate(every):
        for name, expert, of_rank in held:
            homes[name, expert].add(rank // mesh.data_ranks)
            reading[name].update(of_rank)
    slices = range(mesh.ep) if mesh.ep > 1 else (None,)
    world = {Holders(_sorted(at), ep) for (_, expert), at in homes.items() for ep in (slices if expert else (None,))}
    mine = {
        name: (
            Holders(_sorted(homes[name, expert]), mesh.ep_rank if expert and mesh.ep > 1 else None),
            tuple(sorted(reading[name])),
        )
        for name, expert, _ in own
    }
    return mine, world


def _sorted(ranks: set[int]) -> tuple[int, ...]:
    return tuple(sorted(ranks))


def _entry(name: str, parameter: nn.Parameter, copies: Holders, readers: tuple[ReadingLayer, ...]) -> BucketEntry:
    return BucketEntry(name, parameter.numel(), parameter.dim() > 1, copies, readers, str(parameter.dtype))


@dataclass(frozen=True)
class ZeroHooks:
    """Sums and gathers beside a schedule: an executor's hooks. Without turns, sums are left to `reduce`."""

    zero: Zero
    turns: BucketTurns | None = None

    def begin(self) -> None:
        if self.turns:
            self.zero.begin(self.turns)

    def need(self, layer: str) -> None:
        self.zero.need(layer)

    def summed(self, layer: str) -> None:
        if self.turns:
            self.zero.summed(layer)
