"""Detects silent data corruption: every so many steps, state that must be bitwise equal is compared by checksums.

Weights: every copy of a parameter (both ranks of a DualPipe stage, all data ranks) received the same bits from the same
gather, those of its owner's rounded FP32 masters. So any difference is an error, and no tolerance is needed: a copy
that differs from the rounded masters is corrupt, and where all copies agree and the masters differ, the masters are.

Masters and moments have one owner each, so there is no copy to compare them with. Instead the owner records their
checksums after one update and compares before the next, and another rank repeats the next update (`witness.py`). Not
detected are changes on an owner between two updates neither of which is checked.

A rank sends two numbers for each tensor (`bit_sums.py`). Comparing sums over ranks, as for the loss, would detect a
difference without locating it.
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
from dryvine.trainer.witness import FIELDS, Mismatch, Witness, field_sums

SHOWN = 4  # copies in a message


class Held(NamedTuple):
    """The checksums of a rank's copy of that part of a parameter which one rank owns."""

    name: str
    first: int  # element in the whole parameter
    weights: Sums
    masters: Sums | None  # of the owner: what its masters round to


class Corrupt(Diverged):
    """State that must be bitwise equal is not."""


class Integrity:
    """Checks one rank's weights and optimizer. Collective; does nothing in a run without `run.integrity_every`.

    Use `watching` around each update, and call `check` after each step."""

    def __init__(self, optimizer: Optimizer, run: RunConfig) -> None:
        self._optimizer, self._run = optimizer, run
        self._recorded: list[Tensor] | None = None  # sums of the state, bucket by bucket, after the last update
        self._mismatches: list[Mismatch] = []
        self._watched = False  # whether an update was watched since the last check

    @contextmanager
    def watching(self, step: int) -> Iterator[Witness | None]:
        """A context for the update of a step, counted from 1. Yields the witness for `Optimizer.update`, if any."""
        if not self._due(step):
            yield None
        else:
            if self._recorded:
                self._mismatches += self._changed(self._recorded)
            witness = Witness(self._optimizer)
            yield witness
            self._watched = True
            self._mismatches += witness.mismatches
        self._recorded = self._sums() if self._due(step + 1) else None

    def forget(self) -> None:
        """Discard recorded checksums. Call when something other than an update has changed the state."""
        self._recorded = None

    def check(self, step: int, saves: bool = False) -> None:
        """Check after a step, if due or if the step `saves`. Raises Corrupt, the same on all ranks."""
        if self._watched or self._due(step) or (saves and self._run.integrity_every):
            self._watched, mismatches, self._mismatches = False, self._mismatches, []
            check_copies(self._optimizer.zero, mismatches)

    def _due(self, step: int) -> bool:
        """Every so many steps, and in steps that are saved, so that no corrupt state is saved."""
        every, run = self._run.integrity_every, self._run
        return every is not None and (step % every == 0 or step % run.checkpoint_every == 0 or step == run.steps)

    def _sums(self) -> list[Tensor]:
        buckets = enumerate(self._optimizer.zero.buckets)
        return [field_sums(self._optimizer.operands(number), bucket.spans(bucket.index)) for number, bucket in buckets]

    def _changed(self, recorded: list[Tensor]) -> Iterator[Mismatch]:
        buckets = self._optimizer.zero.buckets
        for bucket, before, now in zip(buckets, recorded, self._sums(), strict=True):
            spans = list(bucket.spans(bucket.index))
            for place, field in (before != now).any(-1).nonzero().tolist():
                rank = self._optimizer.zero.mesh.rank
                yield Mismatch(FIELDS[field], spans[place].name, rank, None)


def check_copies(zero: Zero, mismatches: Sequence[Mismatch] = ()) -> None:
    """Compare copies of weights. Raises Corrupt, the same on all ranks, with rank, host and tensor of what differs and
    of the `mismatches` that any rank has found before. Collective."""
    zero.settle()
    own = [held for bucket in zero.buckets for held in _held(bucket)]
    gathered = zero.mesh.gather((socket.gethostname(), own, list(mismatches)), "sums of weights")
    every = cast(list[tuple[str, list[Held], list[Mismatch]]], gathered)
    hosts = [host for host, _, _ in every]
    bad = [mismatch.line(hosts) for _, _, of_rank in every for mismatch in of_rank]
    bad += _differing(hosts, [held for _, held, _ in every])
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise Corrupt(
            f"copies of the same weights or optimizer state differ: {'; '.join(bad[:SHOWN])}{more}; exclude that host, "
            f"whose GPU or memory is faulty, and the same command resumes from the last checkpoint"
        )


def _held(bucket: Bucket) -> Iterator[Held]:
    """The checksums of each member's part in each shard of the bucket."""
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
