"""A second rank makes the same update: finds an optimizer step that came out wrong, which no later step would show.

Under ZeRO-1 masters and moments have one owner each. So in a watched step every owner hands the operands of its shard
to the next copy of the bucket, in a ring, before it steps them; that rank steps them too, and compares the bits of the
results by their sums. An owner without a copy repeats its own step. A part of a shard travels at a time, so that it
takes no more memory than PART elements do: 16 bytes for each, and as many where they come from.

Of two ranks that disagree it cannot be told which is wrong, so both are named. To vote, a third would be needed, which
two copies of a stage do not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.comm.collectives import shift
from dryvine.parallel.bucket import Bucket, ShardSpan
from dryvine.trainer.adam import Operands
from dryvine.trainer.bit_sums import bit_sums
from dryvine.trainer.optim import Optimizer

PART = 1 << 22  # elements of a shard that travel at a time; whole vectors (`buckets.LANES`)
FIELDS = ("master", "exp_avg", "exp_avg_sq")  # of operands, that an update changes


class Doubt(NamedTuple):
    """A field of a tensor that has not the bits that it should have."""

    field: str
    name: str
    owner: int  # world rank
    witness: int | None  # which steps it to other bits; None: it changed on its owner between two updates

    def line(self, hosts: list[str]) -> str:
        """`hosts` by world rank."""
        who = f"{self.field} of {self.name} on rank {self.owner} ({hosts[self.owner]})"
        if self.witness is None:
            return f"{who}, which changed between two updates"
        if self.witness == self.owner:
            return f"{who}, which steps it to other bits the second time"
        return f"{who}, which rank {self.witness} ({hosts[self.witness]}) steps to other bits"


class Witness:
    """Of one update; an `UpdateWitness`. Collective over the copies of each bucket."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.doubts: list[Doubt] = []
        self._optimizer, self._mesh = optimizer, optimizer.zero.mesh
        self._repeated = torch.empty(0)  # sums of what this rank has made of the state of the one before

    def before(self, number: int, rate: float) -> None:
        """Step the shard of the rank before."""
        bucket, own = self._optimizer.zero.buckets[number], self._optimizer.operands(number)
        segments, spans = list(bucket.segments(_before(bucket))), list(bucket.spans(_before(bucket)))
        found = []
        for start in range(0, len(own.master), PART):
            end = min(start + PART, len(own.master))
            theirs = Operands(*(self._shift(bucket, tensor) for tensor in own.part(start, end)))
            inside = ((matrices, _within(part, start, end)) for matrices, part in segments)
            self._optimizer.step_shard(theirs, [(m, part) for m, part in inside if part.start < part.stop], rate)
            found.append(field_sums(theirs, _moved(spans, start, end)))
        self._repeated = torch.cat(found)

    def after(self, number: int) -> None:
        """Compare with what the rank before has made of it."""
        bucket, own = self._optimizer.zero.buckets[number], self._optimizer.operands(number)
        spans = list(bucket.spans(bucket.index))
        starts = range(0, len(own.master), PART)
        made = [field_sums(own.part(start, start + PART), _moved(spans, start, start + PART)) for start in starts]
        self._compare(bucket, torch.cat(made))

    def _compare(self, bucket: Bucket, made: Tensor) -> None:
        """`made`: the sums of this rank's own new state, which go to the next."""
        size = len(bucket.master)
        spans = list(bucket.spans(_before(bucket)))
        names = [span.name for at in range(0, size, PART) for span in _moved(spans, at, at + PART)]
        # As many rows as the shard of any copy may have.
        rows = torch.zeros(len(bucket.members) + size // PART + 1, *made.shape[1:], dtype=made.dtype)
        rows[: len(made)] = made
        theirs = self._shift(bucket, rows.flatten()).view(rows.shape)[: len(names)]
        owner = self._rank_of(bucket, _before(bucket))
        for row, field in (theirs.cpu() != self._repeated.cpu()).any(-1).nonzero().tolist():
            self.doubts.append(Doubt(FIELDS[field], names[row], owner, self._mesh.rank))

    def _rank_of(self, bucket: Bucket, index: int) -> int:
        return self._mesh.ranks(*bucket.layout.copies)[index]

    def _shift(self, bucket: Bucket, part: Tensor) -> Tensor:
        """`part` of the rank before. Travels between devices, and is made where `part` is."""
        if bucket.group is None:
            return part.clone()
        sent = part.contiguous().to(bucket.grads.device).view(torch.uint8)
        arrived = torch.empty_like(sent)
        what = f"a second look at the update of {bucket.layout.name}"
        shift(arrived, sent, bucket.group, self._mesh.watch, what).wait(whole=False)
        return arrived.view(part.dtype).to(part.device)


def field_sums(operands: Operands, spans: Iterable[ShardSpan]) -> Tensor:
    """int64 [spans, FIELDS, 2], of the spans of a shard or of a part of one."""
    rows = [torch.stack([bit_sums(getattr(operands, field)[span.in_shard]) for field in FIELDS]) for span in spans]
    return torch.stack(rows) if rows else torch.empty(0, len(FIELDS), 2, dtype=torch.int64)


def _before(bucket: Bucket) -> int:
    return (bucket.index - 1) % bucket.copies


def _within(part: slice, start: int, end: int) -> slice:
    """A slice of a shard, in its elements start..end."""
    return slice(max(part.start, start) - start, min(part.stop, end) - start)


def _moved(spans: Iterable[ShardSpan], start: int, end: int) -> Iterator[ShardSpan]:
    """Those with elements in start..end of the shard, each cut to them."""
    for span in spans:
        inside = _within(span.in_shard, start, end)
        if inside.start < inside.stop:
            yield span._replace(in_shard=inside)
