"""Which parameters share a bucket, and in which order buckets travel. Without torch: plans count with the same rule.

Parameters with the same copies, dtype and stages lie in one flat bucket, cut where a layer ends and the bucket is large
enough: small enough that its sum can leave while the layer before still computes, large enough that its message is not
all latency. All ranks that hold a bucket cut it alike, as copies hold the same layers.

All collectives of a step have one order over the whole world, taken from the schedule: by when the last copy of a
bucket is complete, or first needed. A rank that is early with a bucket waits for its turn; were it to send whatever is
ready, the two ranks of a DualPipe stage, which end their two stages in opposite orders, would wait for each other with
kernels that hold SMs.

Matrices come first and then vectors, each from a multiple of LANES on, as do shards: AdamW's vectorised kernels round
the last few elements of a call differently, so that a call must never end within a vector, or a layout would show in
the bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dryvine.comm.integers import round_up
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.simulate import Timeline, simulate

LANES = 16  # FP32 elements of the widest vector of a CPU
CUT = 1 << 23  # elements from which a bucket is cut: 32 MiB of sums


class ReadingLayer(NamedTuple):
    """A layer that reads a parameter."""

    place: int  # of the layer, in the model's order
    stage: int
    layer: str


class Holders(NamedTuple):
    """Who holds a parameter."""

    homes: tuple[int, ...]  # pipeline ranks
    ep: int | None  # the expert-parallel rank, of a slice of the experts; None: all


Identity = tuple[tuple[ReadingLayer, ...], tuple[int, ...], int, str]


class BucketEntry(NamedTuple):
    """A parameter as buckets see it; `elements` are those of one copy."""

    name: str
    elements: int
    matrix: bool
    copies: Holders
    readers: tuple[ReadingLayer, ...]  # ascending
    dtype: str


class LayoutSpan(NamedTuple):
    """The elements of one parameter in a shard of a bucket."""

    name: str
    start: int  # the first, counted in the parameter's part of this bucket
    in_shard: slice

    @property
    def elements(self) -> int:
        return int(self.in_shard.stop - self.in_shard.start)


@dataclass(frozen=True)
class BucketLayout:
    """The parameters of a bucket in their order, matrices before vectors, and where each begins."""

    copies: Holders
    dtype: str
    readers: tuple[ReadingLayer, ...]  # of all its parameters, ascending
    starts: Mapping[str, int]
    vectors: int  # where vectors begin
    end: int  # of the last parameter
    padding: int  # before the vectors, where matrices have ended

    @property
    def elements(self) -> int:
        """Those that are no padding."""
        return self.end - self.padding

    def padded(self, copies: int) -> int:
        """Elements with those that fill up the last shard."""
        return round_up(self.end, copies * LANES)

    def spans(self, index: int, size: int) -> Iterator[LayoutSpan]:
        """What is in the shard of copy `index`, where each has `size` elements."""
        first, end = index * size, (index + 1) * size
        stops = [*self.starts.values(), self.end][1:]
        for (name, start), stop in zip(self.starts.items(), stops, strict=True):
            low, high = max(start, first), min(stop - self.padding if stop == self.vectors else stop, end)
            if low < high:
                yield LayoutSpan(name, low - start, slice(low - first, high - first))

    @cached_property
    def stages(self) -> frozenset[int]:
        return frozenset(reader.stage for reader in self.readers)

    @property
    def name(self) -> str:
        """For messages: what is in it, by its layers."""
        layers = list(dict.fromkeys(reader.layer for reader in self.readers))
        kind = "all" if self.copies.ep is None else "experts"
        return f"{layers[0]} to {layers[-1]} ({kind})" if len(layers) > 1 else f"{layers[0]} ({kind})"

    @property
    def identity(self) -> Identity:
        """Differs from that of any other bucket of the run, and sorts by the model's order."""
        return self.readers, self.copies.homes, -1 if self.copies.ep is None else self.copies.ep, self.dtype


def layouts(entries: Iterable[BucketEntry]) -> list[BucketLayout]:
    """The buckets of a rank's parameters, in the model's order."""
    alike: defaultdict[tuple[object, ...], list[BucketEntry]] = defaultdict(list)
    for entry in entries:
        stages = tuple(sorted({reader.stage for reader in entry.readers}))
        alike[entry.copies, entry.dtype, stages].append(entry)
    made = [_layout(part) for same in alike.values() for part in _cut(same)]
    return sorted(made, key=lambda layout: layout.identity)


def _cut(entries: Iterable[BucketEntry]) -> Iterator[list[BucketEntry]]:
    """In runs of whole layers of at least CUT elements; the last may be smaller."""
    part: list[BucketEntry] = []
    for entry in sorted(entries, key=lambda entry: (entry.readers, entry.name)):
        if part and entry.readers != part[-1].readers and sum(e.elements for e in part) >= CUT:
            yield part
            part = []
        part.append(entry)
    yield part


def _layout(entries: Sequence[BucketEntry]) -> BucketLayout:
    matrices = sorted((e for e in entries if e.matrix), key=lambda e: e.name)
    vectors = sorted((e for e in entries if not e.matrix), key=lambda e: e.name)
    boundary = round_up(sum(e.elements for e in matrices), LANES)
    starts, at = {}, 0
    for entry in (*matrices, *vectors):
        at = boundary if entry in vectors[:1] else at
        starts[entry.name] = at
        at += entry.elements
    readers = tuple(sorted({reader for entry in entries for reader in entry.readers}))
    first = entries[0]
    padding = at - sum(e.elements for e in entries)
    return BucketLayout(first.copies, first.dtype, readers, starts, boundary, at, padding)


class BucketTurns(NamedTuple):
    """The numbers of a rank's buckets in the order in which their gradients are summed, and in that in which their
    weights are gathered."""

    sums: tuple[int, ...]
    gathers: tuple[int, ...]


class StageTimes(NamedTuple):
    """By stage, over all copies: the start of the first forward, and the end of the last weight gradient."""

    read: dict[int, float]
    summed: dict[int, float]


def equal_times(schedule: Schedule) -> StageTimes:
    """Those of a step in which all ops cost the same: every rank orders its buckets by them."""
    return stage_times(simulate(schedule))


def turns(times: StageTimes, buckets: Sequence[BucketLayout]) -> BucketTurns:
    """The order of sums (when a bucket's last copy has all its gradients) and of gathers (when its first copy is
    read). Within a stage, backwards end with the first bucket."""

    def summed(number: int) -> tuple[float, int, Identity]:
        bucket = buckets[number]
        return max(times.summed[stage] for stage in bucket.stages), -bucket.readers[0].place, bucket.identity

    def read(number: int) -> tuple[float, Identity]:
        bucket = buckets[number]
        return min(times.read[stage] for stage in bucket.stages), bucket.identity

    numbers = range(len(buckets))
    return BucketTurns(tuple(sorted(numbers, key=summed)), tuple(sorted(numbers, key=read)))


def stage_times(timeline: Timeline) -> StageTimes:
    first: defaultdict[int, float] = defaultdict(lambda: float("inf"))
    last: defaultdict[int, float] = defaultdict(float)
    for cell in (cell for row in timeline.cells for cell in row):
        for op in cell.slot:
            if op.kind == "F":
                first[op.stage] = min(first[op.stage], cell.start)
            elif op.kind in "BW":
                last[op.stage] = max(last[op.stage], cell.end)
    return StageTimes(dict(first), dict(last))
