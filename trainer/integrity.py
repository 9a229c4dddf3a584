"""Finds a GPU that computes or keeps wrongly: what must have the same bits is compared bit by bit, every so many steps.

Weights: every copy of a parameter (both ranks of a DualPipe stage, all data ranks) was given the same bits by the same
gather, which are those of its owner's FP32 masters, rounded. So any difference is damage, and no tolerance is needed: a
copy that is not what the masters round to is bad, and where all copies agree and the masters do not, the masters are.

Masters and moments have one owner each, so there is no copy to compare them with. They are watched in time instead:
the owner notes their sums after one update and compares before the next, and the next is made a second time by another
rank (`witness.py`). What changes unseen is what changes on an owner between two updates of which none is watched.

A rank sends two numbers for what it compares, and not the bits. Sums over ranks, as the loss is, would notice and name
nobody.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

from torch import Tensor

from dryvine.parallel.bucket import Bucket
from dryvine.parallel.zero import Zero
from dryvine.trainer.bit_sums import Sums, sums
from dryvine.trainer.config import RunConfig
from dryvine.trainer.nonfinite import Diverged
from dryvine.trainer.optim import Optimizer
from dryvine.trainer.witness import FIELDS, Doubt, Witness, field_sums

SHOWN = 4  # copies in a message


class Held(NamedTuple):
    """What a rank holds of the part of a parameter that one rank owns."""

    name: str
    first: int  # element in the whole parameter
    weights: Sums
    masters: Sums | None  # of the owner: what its masters round to


class Corrupt(Diverged):
    """What must have the same bits has others."""


class Integrity:
    """Of one rank's weights and optimizer. Collective; does nothing in a run without `run.integrity_every`.

    Around each update: `watching`; after a step: `check`."""

    def __init__(self, optimizer: Optimizer, run: RunConfig) -> None:
        self._optimizer, self._run = optimizer, run
        self._noted: list[Tensor] | None = None  # sums of the state, bucket by bucket, after the last update
        self._doubts: list[Doubt] = []
        self._watched = False  # an update was, since the last check

    @contextmanager
    def watching(self, step: int) -> Iterator[Witness | None]:
        """Around the update of a step, counted from 1. The witness is for `Optimizer.update`."""
        if not self._due(step):
            yield None
        else:
            if self._noted:
                self._doubts += self._changed(self._noted)
            witness = Witness(self._optimizer)
            yield witness
            self._watched = True
            self._doubts += witness.doubts
        self._noted = self._sums() if self._due(step + 1) else None

    def forget(self) -> None:
        """The state was changed by something else than an update."""
        self._noted = None

    def check(self, step: int, saves: bool = False) -> None:
        """After a step, if it is time, or if the step `saves`: raise Corrupt, on all ranks the same."""
        if self._watched or self._due(step) or (saves and self._run.integrity_every):
            self._watched, doubts, self._doubts = False, self._doubts, []
            check_copies(self._optimizer.zero, doubts)

    def _due(self, step: int) -> bool:
        """What is not sound is not saved, so steps that are saved are watched too."""
        every, run = self._run.integrity_every, self._run
        return every is not None and (step % every == 0 or step % run.checkpoint_every == 0 or step == run.steps)

    def _sums(self) -> list[Tensor]:
        buckets = enumerate(self._optimizer.zero.buckets)
        return [field_sums(self._optimizer.operands(number), bucket.spans(bucket.index)) for number, bucket in buckets]

    def _changed(self, noted: list[Tensor]) -> Iterator[Doubt]:
        buckets = self._optimizer.zero.buckets
        for bucket, before, now in zip(buckets, noted, self._sums(), strict=True):
            spans = list(bucket.spans(bucket.index))
            for place, field in (before != now).any(-1).nonzero().tolist():
                rank = self._optimizer.zero.mesh.rank
                yield Doubt(FIELDS[field], spans[place].name, rank, None)


def check_copies(zero: Zero, doubts: Sequence[Doubt] = ()) -> None:
    """Raise Corrupt, on all ranks the same, that names rank, host and tensor of what differs: the `doubts` of any rank,
    and copies of weights. Collective."""
    zero.settle()
    own = [held for bucket in zero.buckets for held in _held(bucket)]
    gathered = zero.mesh.gather((socket.gethostname(), own, list(doubts)), "sums of weights")
    every = cast(list[tuple[str, list[Held], list[Doubt]]], gathered)
    hosts = [host for host, _, _ in every]
    bad = [doubt.line(hosts) for _, _, of_rank in every for doubt in of_rank]
    bad += _differing(hosts, [held for _, held, _ in every])
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise Corrupt(
            f"copies of the same weights or optimizer state differ: {'; '.join(bad[:SHOWN])}{more}; leave that host "
            f"out, which computes or keeps them wrongly, and the same command goes on from the last checkpoint"
        )


def _held(bucket: Bucket) -> Iterator[Held]:
    """Of each member, the part in each shard of the bucket."""
    size = bucket.master.numel()
    for index in range(bucket.copies):
        for name, first, inside, _ in bucket.spans(index):
            values = bucket.values[index * size :][inside]
            masters = bucket.master[inside].to(values.dtype) if index == bucket.index else None
            yield Held(name, first, sums(values), None if masters is None else sums(masters))


def _differing(hosts: list[str], every: list[list[Held]]) -> Iterator[str]:
    copies: defaultdict[tuple[str, int], dict[int, Held]] = defaultdict(dict)
    for rank, parts in enumerate(every):
        for held in parts:
            copies[held.name, held.first][rank] = held
    for (name, _), by_rank in copies.items():
        owner, masters = next((rank, held.masters) for rank, held in by_rank.items() if held.masters is not None)
        others = {held.weights for held in by_rank.values()}
        if len(by_rank) > 1 and len(others) == 1 and masters not in others:
            yield f"masters of {name} on rank {owner} ({hosts[owner]})"
            continue
        for rank, held in by_rank.items():
            if held.weights != masters:
                yield f"{name} on rank {rank} ({hosts[rank]})"
