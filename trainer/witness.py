"""Repeats an optimizer update on a second rank, to detect a wrong result, which nothing later would show.

Under ZeRO-1 masters and moments have one owner each. So in a watched step every owner sends the operands of its shard
to the next copy of the bucket, in a ring, before it updates them; that rank updates them too, and the results are
compared by checksums. An owner without a copy repeats its own update. Shards are sent PART elements at a time, which
bounds the memory that this takes: 16 bytes an element, on the sending and on the receiving rank.

If two ranks disagree, either may be wrong, so both are named. Voting would need a third copy, which a stage with two
copies does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.comm.collectives import shift
from dryvine.parallel.bucket import Bucket, ShardSpan
from dryvine.trainer.adam import Operands, Update
from dryvine.trainer.bit_sums import bit_sums
from dryvine.trainer.optim import Optimizer

PART = 1 << 22  # elements of a shard that are sent at a time; a multiple of the vector width (`buckets.LANES`)
FIELDS = ("master", "exp_avg", "exp_avg_sq")  # the operands that an update changes


class Mismatch(NamedTuple):
    """A field of a tensor whose bits are wrong."""

    field: str
    name: str
    owner: int  # world rank
    witness: int | None  # rank whose update has another result; None: it changed on its owner between two updates

    def line(self, hosts: list[str]) -> str:
        """The mismatch in words. `hosts` are the host names by world rank."""
        who = f"{self.field} of {self.name} on rank {self.owner} ({hosts[self.owner]})"
        if self.witness is None:
            return f"{who}, which changed between two updates"
        if self.witness == self.owner:
            return f"{who}, which has another result when it repeats the update"
        return f"{who}, of which rank {self.witness} ({hosts[self.witness]}) computes another update"


class Witness:
    """The `UpdateWitness` of one update. Collective over the copies of each bucket."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.mismatches: list[Mismatch] = []
        self._optimizer, self._mesh = optimizer, optimizer.zero.mesh
        self._repeated = torch.empty(0)  # checksums of this rank's update of the previous rank's state

    def before(self, number: int, update: Update) -> None:
        """Update a copy of the previous rank's shard."""
        bucket, own = self._optimizer.zero.buckets[number], self._optimizer.operands(number)
        spans, matrices = list(bucket.spans(_before(bucket))), bucket.matrices(_before(bucket))
        found = []
        for start in range(0, len(own.master), PART):
            end = min(start + PART, len(own.master))
            part = own._replace(matrices=matrices).part(slice(start, end))
            theirs = part.map(lambda tensor: self._shift(bucket, tensor))
            self._optimizer.step_shard(theirs, update)
            found.append(field_sums(theirs, _moved(spans, start, end)))
        self._repeated = torch.cat(found)

    def after(self, number: int) -> None:
        """Compare the result with the previous rank's own."""
        bucket, own = self._optimizer.zero.buckets[number], self._optimizer.operands(number)
        spans = list(bucket.spans(bucket.index))
        starts = range(0, len(own.master), PART)
        made = [
            field_sums(own.part(slice(start, start + PART)), _moved(spans, start, start + PART)) for start in starts
        ]
        self._compare(bucket, torch.cat(made))

    def _compare(self, bucket: Bucket, made: Tensor) -> None:
        """`made`: the checksums of this rank's own new state, which are sent to the next rank."""
        size = len(bucket.master)
        spans = list(bucket.spans(_before(bucket)))
        names = [span.name for at in range(0, size, PART) for span in _moved(spans, at, at + PART)]
        # As many rows as the shard of any copy may have.
        rows = torch.zeros(len(bucket.members) + size // PART + 1, *made.shape[1:], dtype=made.dtype)
        rows[: len(made)] = made
        theirs = self._shift(bucket, rows.flatten()).view(rows.shape)[: len(names)]
        owner = self._rank_of(bucket, _before(bucket))
        for row, field in (theirs.cpu() != self._repeated.cpu()).any(-1).nonzero().tolist():
            self.mismatches.append(Mismatch(FIELDS[field], names[row], owner, self._mesh.rank))

    def _rank_of(self, bucket: Bucket, index: int) -> int:
        return self._mesh.ranks(*bucket.layout.copies)[index]

    def _shift(self, bucket: Bucket, part: Tensor) -> Tensor:
        """The previous rank's `part`, on the device of this rank's. It is sent between the buckets' devices."""
        if bucket.group is None:
            return part.clone()
        sent = part.contiguous().to(bucket.grads.device).view(torch.uint8)
        arrived = torch.empty_like(sent)
        what = f"checking the update of {bucket.layout.name}"
        shift(arrived, sent, bucket.group, self._mesh.watch, what).wait(whole=False)
        return arrived.view(part.dtype).to(part.device)


def field_sums(operands: Operands, spans: Iterable[ShardSpan]) -> Tensor:
    """Checksums, int64 [spans, FIELDS, 2], of the spans of a shard or of a part of one."""
    rows = [torch.stack([bit_sums(getattr(operands, field)[span.in_shard]) for field in FIELDS]) for span in spans]
    return torch.stack(rows) if rows else torch.empty(0, len(FIELDS), 2, dtype=torch.int64)


def _before(bucket: Bucket) -> int:
    return (bucket.index - 1) % bucket.copies


def _within(part: slice, start: int, end: int) -> slice:
    """The intersection of a slice of a shard with the elements start..end, relative to `start`."""
    return slice(max(part.start, start) - start, min(part.stop, end) - start)


def _moved(spans: Iterable[ShardSpan], start: int, end: int) -> Iterator[ShardSpan]:
    """The spans' intersections with the elements start..end of the shard, relative to `start`, without empty ones."""
    for span in spans:
        inside = _within(span.in_shard, start, end)
        if inside.start < inside.stop:
            yield span._replace(in_shard=inside)
