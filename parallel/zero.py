"""Gradients summed over every copy of a parameter, and the optimizer's state sharded over them (ZeRO-1).

A parameter's copies are on all ranks that hold its global name: both ranks of a DualPipe stage, all data ranks (for an
expert, those with the same expert-parallel rank), and the ranks of the first and last stage for weights that MTP
shares. So the groups follow from the names, which follow from the schedule's routes, and no layout is a special case.
Parameters with the same copies share flat buckets (`buckets.py`): a bucket's gradient is reduce-scattered, each rank
updates its shard in FP32, and the result is all-gathered in the parameters' own dtype. Every element of every gradient
is then on exactly one rank, so the global norm is right in any layout: the sum of the shards' squares, each counted
once.

None of this is a separate phase at the end of a step. A bucket's reduce-scatter starts when its last gradient has been
added, during the pipeline's cooldown, and the new weights of a layer are waited for when a forward first reads them.

The alternative, an optimizer over `.grad` with hooks (DDP, DeepSpeed), supports neither the two copies of a stage nor
gradients that a schedule defers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dryvine.comm.mesh import Mesh
from dryvine.comm.pending import Pending
from dryvine.parallel.bucket import ON_DEVICE, BucketMemory, Piece, is_expert, make_bucket
from dryvine.parallel.buckets import BucketEntry, BucketTurns, Holders, ReadingLayer, equal_times, layouts, turns
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.stalls import Stalls

NORM_PART = 1 << 24  # elements whose norm is taken at a time: 128 MiB in FP64
ANYWHERE = (ReadingLayer(0, 0, "all"),)  # for parameters without information on their layers


class Zero:
    """This rank's buckets. Made once from the parameters of all its stages, which become views of them; collective.

    The order of calls in a step: `begin`, `summed` for each layer while the schedule runs, `reduce`, the update of the
    masters, `send`, and in the next step `need` before a layer is read. All ranks pass the same turns to `begin`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mesh: Mesh,
        readers: Mapping[str, tuple[ReadingLayer, ...]] | None = None,
        memory: BucketMemory = ON_DEVICE,
    ) -> None:
        """`readers` are this rank's layers that read each parameter; without it, all parameters belong to one layer."""
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
        """This rank's part of every parameter. Each element is owned by exactly one rank."""
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
        """The order in which a schedule sums and gathers this rank's buckets."""
        return turns(equal_times(schedule), [bucket.layout for bucket in self.buckets])

    def begin(self, turns: BucketTurns) -> None:
        """Call at the start of a schedule in which `summed` is called for layers; sums and gathers follow `turns`."""
        self._turns, self._to_sum = turns, list(turns.sums)
        self._unsummed = [set(layers) for layers in self._layers]

    def summed(self, layer: str) -> None:
        """Call when the last gradient of the step has been added to the layer's weights, in the current stream. Starts
        the sums of complete buckets whose turn it is."""
        for missing in self._unsummed:
            missing.discard(layer)
        while self._to_sum and not self._unsummed[self._to_sum[0]]:
            self._begin_sum(self._to_sum.pop(0))

    def reduce(self) -> None:
        """Sum the gradients over all copies; each rank keeps the shard it owns. Starts the remaining sums, and waits
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

        Computed by torch's foreach kernel, which sums FP32 numbers in FP64: `vector_norm` makes an FP64 copy first, of
        twice the gradients' memory. On a CPU only the latter exists, and is applied to a part at a time.
        """
        parts = [part for bucket in self.buckets for part in bucket.grad_shard.split(NORM_PART)]
        norms = torch.stack(torch._foreach_norm(parts, 2.0, dtype=torch.float64))
        return self.mesh.sum(norms.square().sum(), "gradient norms").sqrt()

    # -- new weights

    @contextmanager
    def new_weights(self, number: int) -> Iterator[Tensor | None]:
        """This rank's shard of a bucket's values, in the parameters' dtype, to be set to the new ones; when the context
        ends, sending it to all copies begins. None where masters are in host memory: the masters are sent. All ranks
        send in the order of `gathers_turn`."""
        bucket = self.buckets[number]
        self._settle(number)
        yield None if bucket.host else bucket.values[bucket.own]
        if bucket.host:
            bucket.put(bucket.master)
        self._gathers[number] = bucket.send(self.mesh.watch, f"gathering the weights of {bucket.layout.name}")

    def send(self, number: int, shard: Tensor | None = None) -> None:
        """Start sending a bucket's new values to all copies, from the FP32 masters of their owners or from `shard`."""
        bucket = self.buckets[number]
        with self.new_weights(number):
            bucket.put(bucket.master if shard is None else shard)

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
    """The holders and reading layers of this rank's parameters, over all ranks. Collective."""
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
    """The executor hooks that overlap sums and gathers with a schedule. Without turns, `reduce` starts all sums."""

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
